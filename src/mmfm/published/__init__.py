"""The files that the paper's authors published: their places, fetching, import, and export in their layout."""

"""The whole configuration, and checks across its sections."""

# ruff: noqa: RUF009 - `nested` returns a field

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmfm.config import choices
from mmfm.config.choices import did_you_mean
from mmfm.config.keys import key, nested, operation, overlaid
from mmfm.config.sampling import Guide, Sample
from mmfm.config.sections import (
    Data,
    Decoder,
    Encoder,
    Extract,
    Fid,
    Gmm,
    Image,
    Latents,
    LatentStats,
    Published,
    SpatialGmm,
    Sweep,
)
from mmfm.config.training import Model, Recipe, Train


@dataclass(frozen=True)
class Config:
    """The whole configuration."""

    run: str = key("subfolder of `results/` for this configuration; empty for `results/` itself")
    gpus: str | int = operation(
        "GPUs per job on each of its nodes: a number, or `auto` for all that the Snakemake profile says a node has"
    )
    processes: int = operation("processes per job on a CPU", minimum=1)
    card: str = operation(
        "GPU whose speed and memory estimates assume; `auto`: the one that nvidia-smi names, else an A100-40GB",
        choices=choices.CARDS,
        as_before="auto",
    )
    max_runtime_hours: float = operation(
        "longest `runtime` that a rule requests, because schedulers reject longer ones; stages resume in the next job",
        unit="hours",
        minimum=0,
        as_before=24.0,
    )
    encoders: dict[str, Encoder] = nested()
    models: dict[str, Model] = nested()
    data: Data = nested()
    image: Image = nested()
    latents: Latents = nested()
    extract: Extract = nested()
    latent_stats: LatentStats = nested()
    gmm: Gmm = nested()
    spatial_gmm: SpatialGmm = nested()
    decoder: Decoder = nested()
    train: Train = nested()
    sample: Sample = nested()
    fid: Fid = nested()
    sweep: Sweep = nested()
    guide: Guide = nested()
    recipes: dict[str, Recipe] = nested(as_before={})
    published: Published = nested()

    def check(self, where: str) -> None:
        """Raise ValueError if `run` is no folder in `results/`, a key names an entry that does not exist, or recipes
        contradict `train` or each other.
        """
        # Names of targets are compared as text, so a run's folder has one spelling; and it lies in `results/`.
        if self.run and not {"", ".", ".."}.isdisjoint(self.run.split("/")):
            raise ValueError(f"'run' is '{self.run}', which is no folder in results/; take a name, such as flowers")
        self.section("model")
        if self.fid.encoder:
            self.section("encoder", self.fid.encoder)
        self._check_given()
        smallest = min(self.fid.reference_images, self.sample.n_images)
        if "kid" in self.fid.metrics and smallest < choices.KID_SUBSET:
            raise ValueError(
                f"'fid.metrics' has kid, which draws subsets of {choices.KID_SUBSET:,} images, but of "
                f"'fid.reference_images' and 'sample.n_images' one is {smallest:,}; raise it, or leave kid out"
            )
        for name, recipe in self.recipes.items():
            for model in recipe.models:
                _named(self.models, model, "models", f"'recipes.{name}.models' names ")
            self._check_recipe(name, overlaid(self.train, recipe.train))
        for setting in choices.SETTINGS:
            for model in self.models:
                matching = [name for name, recipe in self.recipes.items() if recipe.matches(setting, model)]
                if len(matching) > 1:
                    both = " and ".join(f"'recipes.{name}'" for name in matching[:2])
                    raise ValueError(f"{both} are both for the setting {setting} and the model {model}; narrow one")

    def _check_given(self) -> None:
        """Raise ValueError if files that belong together are partly given and partly made."""
        mixture, spatial = self.gmm.weights, self.spatial_gmm.weights
        if (mixture == "fit") != (spatial == "compute"):
            raise ValueError(
                f"'gmm.weights' is {mixture}, but 'spatial_gmm.weights' {spatial}; they share their modes, so "
                "give both, or make both"
            )
        if self.guide.weights == "published" and mixture == "fit":
            raise ValueError(
                "'guide.weights' is published, but 'gmm.weights' fit: a guide knows its own mixture's modes only; set "
                "the mixtures to published, or 'guide.weights' to train"
            )
        given = {
            "spatial_gmm.weights": spatial,
            "train.weights": self.train.weights,
            "guide.weights": self.guide.weights,
        }
        if self.latent_stats.weights == "compute" and "published" in given.values():
            key = next(name for name, value in given.items() if value == "published")
            raise ValueError(
                f"'{key}' is published, made with the published latent statistics; set 'latent_stats.weights' to "
                "published, or to their file"
            )

    def _check_recipe(self, name: str, train: Train) -> None:
        where, recipe = f"recipes.{name}.train", self.recipes[name]
        train.loss_weighting.check(f"{where}.loss_weighting")
        train.initial_phase.check(f"{where}.initial_phase")
        # A recipe for guides only may have a phase that is longer than the budget of `train`.
        replace(train, steps=1).check(where)
        weighting = train.loss_weighting
        lacking = [setting for setting in recipe.settings if not choices.SETTINGS[setting].mixture]
        if "loss_weighting" in recipe.train and weighting.rule != "none" and weighting.by == "mode" and lacking:
            raise ValueError(
                f"'{where}.loss_weighting.by' is mode, but the setting '{lacking[0]}' has no modes; set it to class, "
                f"or take the setting out of 'recipes.{name}.settings'"
            )

    def recipe_of(self, setting: str, model: str) -> str:
        """Return the name of the recipe for a setting and an entry of `models`; empty if there is none."""
        return next((name for name, recipe in self.recipes.items() if recipe.matches(setting, model)), "")

    def train_of(self, setting: str, model: str = "", *, guide: bool = False) -> Train:
        """Return the section `train` of a training: with its recipe laid over it, and of a guide its budget.

        Args:
            model: entry of `models`; empty for ``train.model``.
        """
        train = replace(self.train, model=model or self.train.model)
        if name := self.recipe_of(setting, train.model):
            train = overlaid(train, self.recipes[name].train)
        return replace(train, epochs=self.guide.epochs, steps=self.guide.steps) if guide else train

    def check_training(self, setting: str, model: str = "", *, guide: bool = False) -> None:
        """Raise ValueError if a training's initial phase is longer than its budget; arguments as for :meth:`train_of`.

        This is checked for the trainings of a run: a recipe for guides may be longer than the budget of `train`.
        """
        train = self.train_of(setting, model, guide=guide)
        name = self.recipe_of(setting, train.model)
        given = self.recipes[name].train if name else {}
        phase, budget = (f"recipes.{name}.train" if key in given else "train" for key in ("initial_phase", "epochs"))
        train.check_budget(phase, "guide" if guide else budget)

    def section(self, name: str, encoder: str = "", model: str = "") -> Any:
        """Return a section; ``encoder`` and ``model`` name the entry of ``encoders`` and ``models``."""
        if name == "encoder":
            return _named(self.encoders, encoder, "encoders")
        if name == "model":
            return _named(self.models, model or self.train.model, "models")
        return getattr(self, name)


def _named(mapping: Mapping[str, Any], name: str, where: str, who: str = "") -> Any:
    if name not in mapping:
        what = f"{who or 'no '}'{name}'{', which is not' if who else ''} in '{where}'"
        raise ValueError(f"{what}{did_you_mean(name, mapping)}; configured: {', '.join(mapping)}")
    return mapping[name]

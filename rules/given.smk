"""Which file a job takes where a key names one: the user's, or a published one."""


def published_file(place, *names):
    """Return a published file: in the folder that the user has, or where it is fetched to.

    Args:
        place: function of :mod:`mmfm.published.layout` that says where it lies; `names` are its arguments.
    """
    name = checked(place, *names, document=PUBLISHED)
    if not C.published.root:
        return f"{FETCHED}/{name}"
    return given("published.root", f"{C.published.root}/{name}", "fetch it, or set published.root to '' to fetch all")


def given_file(key, value, wildcards, place, *names, made):
    """Return a job's file for a key: a published one, or the user's, whose path may name encoder and setting."""
    if value == "published":
        return published_file(place, C.encoders[wildcards.encoder].family, *names)
    return given(key, value.format(**dict(wildcards.items())), f"set it to a file, to `published`, or to `{made}`")


def given_decoder(wildcards):
    """Return the configured decoder file."""
    path = given_file("decoder.weights", C.decoder.weights, wildcards, layout.decoder, made="train")
    checked(checks.decoder, wildcards.encoder, C, Path(path))
    return path


def given_statistics(wildcards):
    """Return the configured file of latent statistics."""
    path = given_file("latent_stats.weights", C.latent_stats.weights, wildcards, layout.statistics, made="compute")
    checked(checks.statistics, wildcards.encoder, C, Path(path))
    return path


def given_mixture(wildcards):
    """Return the configured mixture of the global tokens."""
    return given_file("gmm.weights", C.gmm.weights, wildcards, layout.mixture, made="fit")


def given_spatial(wildcards):
    """Return the configured spatial mixture."""
    return given_file("spatial_gmm.weights", C.spatial_gmm.weights, wildcards, layout.spatial_mixture, made="compute")


def step_of(wildcards):
    """Return the step that a target names; None for the last."""
    return int(wildcards.step.removeprefix(".step")) if getattr(wildcards, "step", "") else None


def given_weights(wildcards):
    """Return the configured weights of the model."""
    step = step_of(wildcards)
    if step is not None and C.train.weights != "published":
        raise refusal(f"'train.weights' is one file, so a target can't name a step ('{wildcards.step}') of it")
    names = wildcards.setting, step
    return given_file("train.weights", C.train.weights, wildcards, layout.checkpoint, *names, made="train")


def given_guide(wildcards):
    """Return the configured weights of the guide."""
    return given_file("guide.weights", C.guide.weights, wildcards, layout.guide, wildcards.setting, made="train")


def published_step(wildcards):
    """Return the step of published weights; None for weights of the user's."""
    if C.train.weights != "published":
        return None
    return step_of(wildcards) or layout.steps(C.encoders[wildcards.encoder].family)[0]


def expected_weights(wildcards, model, step):
    """Return what given weights must be, as JSON; see `mmfm import --help`."""
    encoder, mixture = C.encoders[wildcards.encoder], mmfm_config.SETTINGS[wildcards.setting].mixture
    return canonical_json(
        {
            "setting": wildcards.setting,
            "model": mmfm_config.keys_of_kind(C.section("model", model=model), "identity"),
            "modes": C.gmm.n_components if mixture else None,
            "step": step,
            "encoder": mmfm_config.keys_of_kind(encoder, "identity"),
            "image_size": C.image.size,
        }
    )


def given_reference(wildcards):
    """Return the configured moments to compare with; nothing where the images give them."""
    if C.fid.reference == "train":
        return []
    if C.fid.reference == "published":
        return published_file(lambda: layout.REFERENCE)
    return given("fid.reference", C.fid.reference, "set it to `train`, `published` or an .npz")


def reference_operation(wildcards, input):
    """Return the operation keys of `fid_reference`, and the published file, if that is what to compare with."""
    published = f" --reference {shlex.quote(input[0])}" if C.fid.reference == "published" else ""
    return f"{OPERATION['fid_reference']}{published}"


def processor_files(wildcards):
    """Return the files of a job's encoder that sampling needs: with published weights, its normalisation alone."""
    if C.train.weights != "published":
        return encoder_files(wildcards)
    return [f"{RESULTS}/processor/{wildcards.encoder}/preprocessor_config.json"]


def say_fetches():
    """Say how much a run will fetch of the published files, after checking that the disk can hold it."""
    jobs = workflow.dag.needrun_jobs() if workflow.is_main_process else []
    wanted = [job.wildcards.file for job in jobs if job.rule is rules.fetch_published.rule]
    if wanted:
        from mmfm.published import fetching

        about = C.published.repository, C.published.revision
        commit, files = checked(fetching.look_up, *about, wanted, document=PUBLISHED)
        checked(fetching.announce, about[0], files, Path(FETCHED), commit, document=PUBLISHED)


def fetchable(_):
    """Return all files that a target of this configuration may fetch."""
    found, published = [DETECTOR] if C.fid.weights == "fetch" else [], []
    for name, encoder in C.encoders.items():
        family = encoder.family
        if encoder.weights.startswith("hf:") and C.train.weights != "published":
            found += [f"{encoder_folder(name)}/{file}" for file in names_of_files(encoder)]
        places = {
            layout.decoder: C.decoder.weights,
            layout.statistics: C.latent_stats.weights,
            layout.mixture: C.gmm.weights,
            layout.spatial_mixture: C.spatial_gmm.weights,
        }
        published += [place(family) for place, value in places.items() if value == "published"]
        if C.train.weights == "published":
            published += layout.checkpoints(family)
        if C.guide.weights == "published":
            published += layout.guides(family)
    if C.fid.reference == "published":
        published.append(layout.REFERENCE)
    if not C.published.root:
        found += [f"{FETCHED}/{name}" for name in published]
    return list(dict.fromkeys(found))


def given_weights_here(wildcards):
    """Return where given weights are imported to, after checking that the target's name fits them."""
    variant = training_variant(wildcards)
    named = {"model": (variant.model, C.train.model), "number of modes": (variant.k, C.gmm.n_components)}
    for what, (found, own) in named.items():
        if found not in (None, own):
            raise refusal(
                f"the {what} '{found}' is not that of the given weights, {own}; {layout.INSTEAD} (see {PUBLISHED})"
            )
    if variant.k is not None and C.gmm.weights == "fit":
        raise refusal(
            f"'train.weights' is given, so give the mixtures that they were trained with: 'gmm.weights' and "
            f"'spatial_gmm.weights' (see {PUBLISHED})"
        )
    return GIVEN.replace("<results>", RESULTS).format(**dict(wildcards.items()))

"""`videodit export`: a training run's averaged weights as a folder that loads without DeepSpeed."""

from pathlib import Path
from typing import Any

import yaml

from videodit.config import load_yaml
from videodit.errors import UserError
from videodit.models.folder import check_out, write_readme
from videodit.training.checkpoint import load_latest
from videodit.training.dit_config import DiTRunConfig, latent_names
from videodit.training.dit_model import export_dit
from videodit.training.posthoc_ema import PosthocEMA
from videodit.training.vae_config import VAERunConfig
from videodit.training.vae_trainer import export_vae


def export_run(run_dir: str | Path, out: str | Path, ema_length: float | None = None) -> str:
    """Writes a VAE folder (from a run of train vae) or a whole model folder (from a run of train dit).

    Args:
        run_dir: the run.
        out: folder to write.
        ema_length: relative width of the average (edm2's sigma_rel), see `PosthocEMA`; None for the run's first.
    Returns:
        Which average it is, for people.
    Raises:
        UserError: if the run has no good checkpoint, what it refers to is gone, or it has no averages of which one of
            that width can be made.
    """
    run_dir, out = Path(run_dir), Path(out)
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no config.yaml; give the run_dir of a training run")
    checkpoint = load_latest(run_dir)
    if checkpoint is None:
        raise UserError(f"{run_dir} has no checkpoint yet: train for at least save_every steps")
    check_out(out)
    facts: dict[str, Any] = {"run": run_dir, "step": checkpoint.step, "average": checkpoint.state["ema_profiles"][0]}
    weights = None
    if ema_length is not None:
        averages = PosthocEMA(run_dir, checkpoint)
        mixture = averages.mix(ema_length)
        weights = averages.read(mixture)
        facts["average"] = (
            f"{ema_length:g}, from {averages.num_checkpoints} checkpoints, its profile off by {mixture.error:.2%}"
        )
    if "prompts" not in yaml.safe_load(path.read_text()):
        vae_config = load_yaml(VAERunConfig, path)
        export_vae(vae_config, checkpoint, out, weights)
        facts |= {"kind": "video VAE", "clips": vae_config.data.name}
    else:
        dit_config = load_yaml(DiTRunConfig, path)
        _check_places(dit_config, path)
        export_dit(dit_config, checkpoint, out, weights)
        facts |= {"kind": "text-to-video model", "latents": ", ".join(latent_names(dit_config)), "vae": dit_config.vae}
    write_readme(out, "export", facts)
    return str(facts["average"])


def _check_places(config: DiTRunConfig, path: Path) -> None:
    """Raises UserError if what a run refers to is not where its config says, as after a move to another machine."""
    places = {"vae": config.vae, "init": config.init if config.lora.rank else None, "text_encoder": config.text_encoder}
    for name, place in places.items():
        if place and not Path(place).is_dir():
            raise UserError(
                f"{name} {place} of this run is not there, seen from {Path.cwd()}: export from the folder where it was "
                f"trained, or set {name} in {path}"
            )

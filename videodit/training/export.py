"""`videodit export`: a training run's averaged weights as a folder that loads without DeepSpeed."""

from pathlib import Path
from typing import Any

import yaml

from videodit.config import load_yaml
from videodit.errors import UserError
from videodit.models.folder import write_readme
from videodit.training.checkpoint import load_latest
from videodit.training.dit_config import DiTRunConfig
from videodit.training.dit_trainer import export_dit
from videodit.training.vae_trainer import VAERunConfig, export_vae


def export_run(run_dir: str | Path, out: str | Path, ema: int = 0) -> Path:
    """Writes a VAE folder (from a run of train vae) or a whole model folder (from a run of train dit).

    Args:
        run_dir: the run.
        out: folder to write.
        ema: which of the run's averages to take.
    Returns:
        out.
    Raises:
        UserError: if the run has no good checkpoint, or what it refers to is gone.
    """
    run_dir, out = Path(run_dir), Path(out)
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no config.yaml; give the run_dir of a training run")
    checkpoint = load_latest(run_dir)
    if checkpoint is None:
        raise UserError(f"{run_dir} has no checkpoint yet: train for at least save_every steps")
    facts: dict[str, Any] = {"run": run_dir, "step": checkpoint.step, "average": checkpoint.state["ema_profiles"][ema]}
    if "eval_shards" in yaml.safe_load(path.read_text()):
        vae_config = load_yaml(VAERunConfig, path)
        export_vae(vae_config, checkpoint, out, ema)
        facts |= {"kind": "video VAE", "clips": vae_config.data.name}
    else:
        dit_config = load_yaml(DiTRunConfig, path)
        export_dit(dit_config, checkpoint, out, ema)
        facts |= {"kind": "text-to-video model", "latents": dit_config.data.name, "vae": dit_config.vae}
    write_readme(out, "export", facts)
    return out

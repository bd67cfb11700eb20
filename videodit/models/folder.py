"""One model, one folder: config.json beside model.safetensors."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from videodit.errors import UserError, user_error

WEIGHTS_NAME = "model.safetensors"
ModelT = TypeVar("ModelT", bound=nn.Module)


_MADE = ("README.md", "config.json", WEIGHTS_NAME, "model_index.json", "dit", "vae", "text_encoder")


def check_out(out: Path) -> None:
    """Refuses a folder that holds something else than a model, which would be mixed with it, or lost.

    Raises:
        UserError: names the first of the other files.
    """
    there = sorted(path.name for path in out.iterdir() if path.name[0] != ".") if out.is_dir() else []
    other = [name for name in there if name.removesuffix(".part") not in _MADE]
    if other or there == ["README.md"]:
        raise UserError(f"--out {out} holds other files, such as {(other or there)[0]}: choose another folder")


def save_model(model: nn.Module, config: Any, folder: str | Path) -> None:
    """Writes a model's config (a dataclass) and weights; bit-exact.

    Args:
        model: any module.
        config: the dataclass it is built from.
        folder: created if missing.
    Raises:
        UserError: if the folder cannot be written.
    """
    folder = Path(folder)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    part = folder / f"{WEIGHTS_NAME}.part"  # never half a file under the name that is loaded
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        save_file(weights, part)
        mode = (folder / "config.json").stat().st_mode
        if part.stat().st_mode != mode:  # safetensors 0.8 writes files that only their owner may read
            part.chmod(mode)
        os.replace(part, folder / WEIGHTS_NAME)
    except OSError as error:
        raise user_error(error, folder) from None
    except SafetensorError as error:  # what safetensors makes of a full disk
        part.unlink(missing_ok=True)
        raise UserError(f"{folder} cannot be written ({error}): free some space, or choose another folder") from None


def load_config(config_class: type, folder: str | Path) -> Any:
    """Reads config.json of a model folder into its dataclass.

    Raises:
        UserError: if it is missing, is no JSON, or has keys or values that the dataclass refuses.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        inside = next((name for name in ("vae", "model") if (Path(folder) / name / "config.json").is_file()), None)
        fix = f"give {Path(folder) / inside}" if inside else "make one with videodit export"
        raise UserError(f"{folder} is not a model folder: it has no config.json; {fix}")
    try:
        values = json.loads(path.read_text())
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        known = {field.name for field in dataclasses.fields(config_class)}
        if other := [key for key in values if key not in known]:
            kind = config_class.__name__.removesuffix("Config")
            raise UserError(
                f"{path} does not describe a {config_class.__name__}: it has {other[0]}; give the folder of a {kind}"
            )
        return config_class(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not describe a {config_class.__name__}: {error}") from None


def load_model(model_class: Callable[[Any], ModelT], config_class: type, folder: str | Path) -> ModelT:
    """Builds a model from a folder and fills it with its weights, in evaluation mode.

    Raises:
        UserError: if config or weights are missing, the file is truncated, or the two do not fit.
    """
    folder = Path(folder)
    config = load_config(config_class, folder)
    try:
        with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
            model = model_class(config)
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{folder / 'config.json'} does not describe a model: {detail[:300]}") from None
    try:
        model.load_state_dict(read_weights(folder), assign=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{folder / WEIGHTS_NAME} does not fit {folder / 'config.json'}: {detail[:300]}") from None
    return model.eval()


def read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a model folder by name.

    Raises:
        UserError: if the file is missing or truncated.
    """
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise UserError(f"{folder} has no weights: {WEIGHTS_NAME} is missing; copy it there or export the run again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or damaged ({error}): copy it or export the run again") from None


def weight_files(folder: Path, name: str) -> list[Path]:
    """The weights of a model that another library wrote: the files that NAME.index.json lists, or NAME alone.

    Args:
        folder: of the model; the files need not be there.
        name: of the file, where there is one.
    Raises:
        UserError: if the list is damaged.
    """
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return [folder / name]
    try:
        listed = json.loads(index.read_text())["weight_map"].values()
        return [folder / file for file in sorted({Path(file).name for file in listed})]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({error!r}): copy the folder again") from None


def weights_sha256(folder: Path, part: str = "*") -> str:
    """Of the weight files of a model folder, in the order of their names.

    Args:
        folder: of the model.
        part: one of its folders, or all of them.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob(f"{part}/*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def settings_sha256(folder: Path) -> str:
    """Of what a model folder says beside its weights: equal weights may be models of different block patterns."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def write_readme(folder: str | Path, verb: str, facts: dict[str, Any]) -> None:
    """Writes the README.md of a model folder: which verb made it, and from what.

    Raises:
        UserError: if it cannot be written.
    """
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    text = f"# A videodit model\n\nMade by `videodit {verb}`.\n\n| fact | value |\n|---|---|\n{rows}\n"
    try:
        (Path(folder) / "README.md").write_text(text, encoding="utf-8")
    except OSError as error:
        raise user_error(error, folder) from None

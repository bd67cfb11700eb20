"""Sends a run's figures and samples to wandb: what was not sent while it trained, as often as you like.

    python tools/send_metrics.py RUN [--mode online|offline] [--project NAME]

The run is the one that training made in wandb, or would have made (RUN/wandb/run_id.txt). RUN/wandb/sent.json counts
the lines that were handed over, and a server is asked what it has, so that nothing is sent twice. Not while the run
trains: its own sender is at work then.
"""

import argparse
import json
import sys
import uuid
from pathlib import Path

import yaml

from videodit.training.sent import read_sent
from videodit.training.tracker import Sender, TrackerConfig


def send(run_dir: Path, mode: str = "online", project: str | None = None) -> int:
    """Sends what is new.

    Args:
        run_dir: the run folder.
        mode: online, or offline for files that `wandb sync` sends.
        project: of wandb; by default the run's.
    Returns:
        Lines of metrics.jsonl sent.
    Raises:
        ValueError: if the folder is no run's.
    """
    if not (run_dir / "metrics.jsonl").is_file() or not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} is not a run folder: it has no metrics.jsonl and config.yaml")
    folder = run_dir / "wandb"
    folder.mkdir(exist_ok=True)
    if not (folder / "run_id.txt").exists():  # a run without a tracker
        (folder / "run_id.txt").write_text(uuid.uuid4().hex[:8])
    file = folder / "settings.json"
    if file.exists():
        settings = json.loads(file.read_text())
    else:
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        own = config.get("tracker", {})
        name = own.get("name") or run_dir.resolve().name
        settings = {"project": own.get("project", TrackerConfig.project), "name": name, "config": config}
    settings |= {"mode": mode} | ({"project": project} if project else {})
    file.write_text(json.dumps(settings, indent=1))
    try:
        sender = Sender(run_dir)
    except BlockingIOError:
        raise ValueError(f"{run_dir} is being sent by another process: wait until the run has ended") from None
    lines = (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    if mode == "offline" and lines <= read_sent(run_dir)["lines"]:
        return 0  # no empty file for wandb sync
    sender.connect()
    count = sender.send_new()
    sender.finish()
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--mode", choices=("online", "offline"), default="online", help="offline: files for wandb sync")
    parser.add_argument("--project", help="of wandb; by default the run's")
    options = parser.parse_args()
    try:
        count = send(options.run, options.mode, options.project)
    except Exception as error:  # wandb raises many kinds
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{count} lines of {options.run / 'metrics.jsonl'} sent")
    return 0


if __name__ == "__main__":
    sys.exit(main())

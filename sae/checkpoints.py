"""Checkpoints of a training run, so that an interrupted run resumes as if it had never stopped.

`checkpoints/` holds the newest states (orbax) and run.json, which says what they belong to. A run opens the folder with
its own identity: equal, and it resumes; different, and the error names what differs. States are written while training
goes on; a crash meanwhile leaves the one before. Of several processes (`sae.hosts`) each writes what its devices
keep, to a folder that all share, and any other number of processes and devices reads it.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from activations.errors import DiskSpaceError, MismatchError, StorageError
from sae import hosts
from sae.config import TrainConfig
from sae.step import TrainState

# A run may be resumed with other values of these: they change where and when it reports, not what it computes; devices
# change its rounding.
FREE = ("store", "out", "eval_every", "eval_tokens", "log_every", "checkpoint_every", "keep_checkpoints", "log")
FREE_COMPUTE = ("data_parallel", "latent_parallel", "patience_s")
GROUPS = ("sae", "compute")
States = dict[str, TrainState]
"""state of each SAE of a run, or of all of a sweep as one, by its hook point"""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, config: TrainConfig, store_fingerprint: str):
        """Open or create the folder; raises MismatchError if it belongs to another run."""
        self.path = config.out.absolute() / "checkpoints"
        if hosts.is_first():
            self.path.mkdir(parents=True, exist_ok=True)
            _check_identity(self.path / "run.json", _identity(config, store_fingerprint))
        if hosts.several():
            _check_shared(self.path / "shared")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep_checkpoints, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.path, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        with suppress(Exception) if kind else _written(self.path):
            self._manager.close()

    @property
    def last(self) -> int:
        """Step of the newest checkpoint that is on disk, 0 if there is none; waits for one that is being written."""
        with _written(self.path):
            self._manager.wait_until_finished()
        return self._manager.latest_step() or 0

    def restore(self, template: States) -> States:
        """The newest states, or `template` itself if there are none."""
        step = self.last
        if not step:
            return template
        names, leaves, structure = _flatten(template)
        wanted = {name: ocp.utils.to_shape_dtype_struct(leaf) for name, leaf in zip(names, leaves, strict=True)}
        saved: Any = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        return jax.tree.unflatten(structure, [saved[name] for name in names])

    def save(self, step: int, states: States) -> int:
        """Begin to keep `states` as the newest; raises DiskSpaceError before writing if they would not fit.

        Returns: the step of the newest checkpoint that is on disk already, which is one before this.
        """
        done = self.last
        if step > done:
            names, leaves, _ = _flatten(states)
            _check_space(self.path, sum(leaf.nbytes for leaf in leaves))
            # Copies, since the next step takes the buffers over, and on a CPU orbax would write from those.
            copy = jnp.copy if hosts.several() else np.array  # of several processes each writes what it has
            copies = {name: copy(leaf) for name, leaf in zip(names, leaves, strict=True)}
            with _written(self.path):
                self._manager.save(step, args=ocp.args.StandardSave(copies))
        return done


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Turn whatever the libraries below raise when a disk is full or broken, also later, into an error of ours."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        kind = DiskSpaceError if "No space left" in reason or "RESOURCE_EXHAUSTED" in reason else StorageError
        fix = "Make room or mend the disk, then run it again: it resumes from the checkpoint before."
        raise kind(path, expected="a checkpoint to be written", got=reason[:200], fix=fix) from error


def _flatten(states: States) -> tuple[list[str], list[Any], Any]:
    paths, structure = jax.tree_util.tree_flatten_with_path(states)
    return [jax.tree_util.keystr(path) for path, _ in paths], [leaf for _, leaf in paths], structure


def _identity(config: TrainConfig, store_fingerprint: str) -> dict[str, Any]:
    exclude = {**dict.fromkeys(FREE, True), "compute": set(FREE_COMPUTE)}
    content = config.model_dump(mode="json", exclude=exclude)
    content["sweep"] = config.sweep.model_dump(mode="json", exclude_none=True) or None
    groups = {f"{group}.{key}": value for group in GROUPS for key, value in content.pop(group).items()}
    return content | groups | {"store": store_fingerprint}


def _check_identity(path: Path, mine: dict[str, Any]) -> None:
    if not path.exists():
        whole = path.with_suffix(f".{os.getpid()}.new")
        whole.write_text(json.dumps(mine, indent=2) + "\n")
        whole.replace(path)
        return
    theirs = json.loads(path.read_text())
    differing = [key for key in mine if mine[key] != theirs.get(key)]
    if differing:
        raise MismatchError(
            f"{path.parent}: checkpoints of another run",
            expected=", ".join(f"{key}={mine[key]}" for key in differing),
            got=", ".join(f"{key}={theirs.get(key)}" for key in differing),
            fix="Use another --set out=..., the old settings, or delete the folder.",
        )


def _check_shared(path: Path) -> None:
    """What process 0 writes now tells a folder that is shared from one that a run has left on this host."""
    mark = secrets.token_hex(8)
    if hosts.is_first():
        path.write_text(mark)
    mark = hosts.of_first_text(mark)
    got = path.read_text() if path.exists() else "nothing"
    if got != mark:
        fix = "Put out on a file system that all processes share; a path that is not absolute starts from each one's."
        raise StorageError(path, expected=f"what process 0 has written there, {mark}", got=got, fix=fix)


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path).free
    if free < 1.1 * needed:
        got = f"{free / 2**20:.0f} MiB"
        raise DiskSpaceError(path, expected=f"{needed / 2**20:.0f} MiB free", got=got, fix="Make room, then resume.")

"""Checkpoints of a run: written in the background, the latest and the best kept, restored onto any mesh."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from jaxrl_llm.sharding import HOST
from jaxrl_llm.training.run.checksums import check_arrays, check_seal, make_seal, sealed_arrays
from jaxrl_llm.training.run.damaged_files import DamagedRunError, reading_checkpoint
from jaxrl_llm.training.run.distributed import any_process
from jaxrl_llm.training.run.library_noise import hush
from jaxrl_llm.training.run.state_tree import check_savable, differences, leaves_by_path

_DELETED, _DAMAGED = "deleted", "damaged"


class Prepared(NamedTuple):
    """A checkpoint that is still to be written."""

    step: int
    arrays: dict[str, Any]
    """By path."""
    extra: dict[str, Any]
    seal: dict[str, Any]


class Checkpointer:
    """The checkpoints of one run, in one folder; a context manager.

    Each is a folder named by its step, written by Orbax: the state's arrays (by path, `params/embed/weight`),
    `extra`, a JSON object, and `seal`, by which what is read is known to be what was saved. A checkpoint is
    written under another name and renamed when it is complete, so a process killed at any moment leaves the
    earlier ones valid and the unfinished one unseen; the next `Checkpointer` on the folder removes it. For the
    same reason an old one is renamed before it is removed.

    `save` copies the arrays and returns; the caller may donate them at once. An error while writing is raised
    by the next call (`save`, `wait`, `close`, or any that reads), and leaves the earlier checkpoints.

    With several processes, each calls every method in the same order; arrays are written and read by the
    processes that hold them, and process 0 writes the JSON.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 3,
        best_metric: str | None = None,
        best_mode: str = "max",
        read_only: bool = False,
    ) -> None:
        """Opens the folder, creating it if need be.

        Args:
            folder: Where the checkpoints are; also a bucket (`gs://…`).
            keep: How many of the latest to keep.
            best_metric: Also keep the checkpoint for which this metric is best (of equals, the latest).
            best_mode: "max" or "min": which value of the metric is best.
            read_only: Only to restore: nothing is created or cleaned, since another process may be writing.

        Raises:
            ValueError: If `keep` or `best_mode` is out of range.
            FileNotFoundError: If `read_only` and there is no such folder.
            DamagedRunError: If the metrics of a checkpoint cannot be read.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, so that a run can resume; got {keep}")
        if best_mode not in ("max", "min"):
            raise ValueError(f'best_mode must be "max" or "min", got {best_mode!r}')
        self.folder = epath.Path(folder if "://" in os.fspath(folder) else os.path.abspath(os.path.expanduser(folder)))
        if read_only and not self.folder.exists():
            raise FileNotFoundError(f"no folder of checkpoints at {self.folder}")
        self._best_metric, self._read_only = best_metric, read_only
        self._current: int | None = None  # the step that this object last saved or restored
        self._saving: int | None = None
        keep_policies: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
        if best_metric is not None:
            keep_policies.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[best_metric],
                    reverse=best_mode == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        if not read_only and jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        any_process(False)  # the folder is there
        options = ocp.CheckpointManagerOptions(
            create=False,
            # Named, they wait for each other without the devices, which may be at work while another thread saves.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes=set(range(jax.process_count())) if jax.process_count() > 1 else None
            ),
            cleanup_tmp_directories=not read_only,
            preservation_policy=policies.AnyPreservationPolicy(keep_policies),
            best_fn=None if best_metric is None else (lambda metrics: metrics[best_metric]),
            best_mode=best_mode,
            # A rename is atomic and removal is not: a kill in its middle would leave half a checkpoint.
            todelete_subdir=_DELETED,
        )
        handlers = ocp.DefaultCheckpointHandlerRegistry()
        for item, save, restore in (
            ("state", ocp.args.StandardSave, ocp.args.StandardRestore),
            ("extra", ocp.args.JsonSave, ocp.args.JsonRestore),
            ("seal", ocp.args.JsonSave, ocp.args.JsonRestore),
        ):
            handlers.add(item, save)
            handlers.add(item, restore)
        hush()
        self._check_metrics()
        self._manager = ocp.CheckpointManager(self.folder, options=options, handler_registry=handlers)
        self._remove_deleted()

    def save(
        self,
        step: int,
        state: Any,
        extra: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Starts to write a checkpoint; waits first for the one before it, if that is still being written.

        Args:
            step: Step of the state.
            state: Tree of arrays; None leaves are fine, PRNG keys must be given as their key data.
            extra: What JSON can hold: data position, counters, configuration.
            metrics: The evaluation of this state, if there was one. Its `best_metric` decides which is best;
                a value that is not finite does not count.

        Returns:
            False if this step is the one last saved or restored: then there is nothing to write.

        Raises:
            ValueError: If the folder has a checkpoint of this or a later step (see `discard_after`), a leaf
                is not an array, or the best metric is not among the metrics.
            TypeError: If JSON cannot hold `extra`.
            OSError: If the checkpoint before could not be written.
        """
        return self.write(self.prepare(step, state, extra), metrics)

    def prepare(
        self, step: int, state: Any, extra: Mapping[str, Any] | None = None, *, aside: bool = False
    ) -> Prepared:
        """What `write` writes, without the devices, and which no later change of its parts changes.

        Args:
            step: Step of the state.
            state: Tree of arrays, as for `save`.
            extra: What JSON can hold.
            aside: Copy the arrays to the memory of the host, so that `state` may be donated before they are written.

        Raises:
            ValueError: If a leaf is not an array.
            TypeError: If JSON cannot hold `extra`.
        """
        arrays = leaves_by_path(state)
        check_savable(arrays)
        # A copy, as it is now: the caller may change its dict while the file is being written.
        copied = json.loads(json.dumps(dict(extra or {})))
        seal = make_seal(step, arrays, copied)
        if aside:
            places = {path: leaf.sharding.with_memory_kind(HOST) for path, leaf in arrays.items()}
            arrays = jax.device_put(arrays, places, may_alias=False)
        return Prepared(step, arrays, copied, seal)

    def write(self, prepared: Prepared, metrics: Mapping[str, float] | None = None) -> bool:
        """Starts to write what was prepared; otherwise as `save`. Any thread may, one at a time."""
        step = prepared.step
        self._check_writable()
        self.wait()
        latest = self._manager.latest_step()
        if latest is not None and step <= latest:
            if step == self._current:
                return False
            raise ValueError(
                f"cannot save step {step}: {self.folder} already has step {latest}. Resume from it, "
                f"discard_after({step - 1}), or use another folder"
            )
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(prepared.arrays),
            extra=ocp.args.JsonSave(prepared.extra),
            seal=ocp.args.JsonSave(prepared.seal),
        )
        # force: the caller decides when to save, not a policy
        self._manager.save(step, args=items, metrics=self._tracked(metrics), force=True)
        self._current = self._saving = step
        return True

    def restore(
        self, abstract_state: Any, step: int | None = None, *, part: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint, onto the shardings of `abstract_state`.

        Args:
            abstract_state: Tree of `jax.ShapeDtypeStruct` with shardings, or of arrays; from any mesh.
            step: Which one; the latest by default.
            part: Whether the checkpoint may have other arrays, too, which are not read.

        Returns:
            The state, bit-equal to the saved one, and `extra`.

        Raises:
            FileNotFoundError: If there is no checkpoint, or none of this step.
            ValueError: If the trees differ (names the paths, shapes and types), or a sharding is missing.
            DamagedRunError: If a file of the checkpoint is missing or damaged.
        """
        step = self._existing(step)
        leaves = leaves_by_path(abstract_state)
        for path, leaf in leaves.items():
            if getattr(leaf, "sharding", None) is None:
                raise ValueError(f"restore needs a sharding for every array of abstract_state; {path} has none")
        abstract = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for path, leaf in leaves.items()
        }
        with self._reading(step):
            extra, seal = self._read_extra(step)
            saved = sealed_arrays(seal)
        if part:
            saved = {path: leaf for path, leaf in saved.items() if path in leaves}
        if found := differences(saved, leaves):
            raise ValueError(
                f"step {step} in {self.folder} is a checkpoint of another model or optimizer:\n  " + "\n  ".join(found)
            )
        with self._reading(step):
            # Not by way of the manager, which waits for the other processes: one of them may fail alone.
            folder = self.folder / str(step) / "state"
            handler = ocp.StandardCheckpointHandler()
            handler.metadata(folder)  # without its file arrays could be read, but not by other programs
            if part:
                wanted = ocp.args.PyTreeRestore(
                    abstract,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                    partial_restore=True,
                )
                restored = ocp.PyTreeCheckpointHandler().restore(folder, args=wanted)
            else:
                restored = handler.restore(folder, args=ocp.args.StandardRestore(abstract))
        with self._reading(step):
            check_arrays(seal, restored)
        self._current = step
        # Every path was compared: the order of the leaves is that of abstract_state.
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [restored[path] for path in leaves]), extra

    def read_extra(self, step: int | None = None) -> dict[str, Any]:
        """Reads `extra` alone: to compare the configuration of a run before its arrays are read.

        Raises:
            FileNotFoundError: If there is no checkpoint, or none of this step.
            DamagedRunError: If the file is missing or damaged.
        """
        step = self._existing(step)
        with self._reading(step):
            return self._read_extra(step)[0]

    def latest_step(self) -> int | None:
        """The latest complete checkpoint's step, or None."""
        self.wait()
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step whose `best_metric` is best, or None if no metric is tracked or none was given yet."""
        self.wait()
        return None if self._best_metric is None else self._manager.best_step()

    @property
    def current_step(self) -> int | None:
        """The step that this object last saved or restored; it may still be being written."""
        return self._current

    def all_steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        self.wait()
        return sorted(self._manager.all_steps())

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps: to go on from an earlier one in the same folder."""
        self._check_writable()
        for later in self.all_steps():
            if later > step:
                self._manager.delete(later)
        self._remove_deleted()

    def set_aside_after(self, step: int) -> list[int]:
        """Moves the checkpoints of later steps, which are damaged, into the folder `damaged`, out of the way.

        Returns:
            The steps of those that were moved.
        """
        self._check_writable()
        later = [found for found in self.all_steps() if found > step]
        if jax.process_index() == 0:
            for found in later:
                aside = self.folder / _DAMAGED / str(found)
                aside.parent.mkdir(exist_ok=True)
                aside.rmtree(missing_ok=True)  # of the same step, from before
                (self.folder / str(found)).rename(aside)
        any_process(False)  # the others go on when it is done
        self._manager.reload()
        return later

    def wait(self) -> None:
        """Waits until the checkpoint being written is complete.

        Raises:
            OSError: If it could not be written, for instance because the disk is full.
        """
        step, self._saving = self._saving, None
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # of any kind: from the background threads, by way of the file system's driver
            self._manager.reload()  # what is on disk, without the failed one
            self._current = None
            cause = " ".join(str(error).split())
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder} (is the disk full?); "
                f"complete ones: {sorted(self._manager.all_steps()) or 'none'}. Cause: {cause:.200}"
            ) from error
        self._remove_deleted()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:  # of any kind, since none may hide the error that ended the run
            if error is None:
                raise
            error.add_note(f"Besides: {failure}")

    def _check_writable(self) -> None:
        if self._read_only:
            raise ValueError(f"the checkpoints in {self.folder} were opened with read_only=True")

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Damage that one process finds is raised in all, so that none waits for another."""
        failure = None
        try:
            with reading_checkpoint(self.folder, step, self.all_steps()):
                yield
        except DamagedRunError as error:
            failure = error
        if any_process(failure is not None):
            raise failure or DamagedRunError(f"checkpoint {step} in {self.folder} is damaged: see another process")

    def _read_extra(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """`extra` and the seal, which belong to each other and to this step."""
        extra, seal = (
            json.loads((self.folder / str(step) / item / "metadata").read_text()) for item in ("extra", "seal")
        )
        check_seal(seal, step, extra)
        return extra, seal

    def _existing(self, step: int | None) -> int:
        steps = self.all_steps()
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self.folder}")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.folder}; it has {steps}")
        return step

    def _tracked(self, metrics: Mapping[str, float] | None) -> dict[str, float] | None:
        """The best metric's value for Orbax, or None where there is none to compare."""
        if self._best_metric is None or metrics is None:
            return None
        if self._best_metric not in metrics:
            raise ValueError(
                f"best_metric {self._best_metric!r} is not among the metrics: {', '.join(sorted(metrics))}"
            )
        value = float(metrics[self._best_metric])
        return {self._best_metric: value} if math.isfinite(value) else None

    def _check_metrics(self) -> None:
        """Orbax reads them all at its start."""
        if self._best_metric is None:
            return
        for file in self.folder.glob("[0-9]*/metrics/metrics"):
            try:
                float(json.loads(file.read_text())[self._best_metric])
            except (ValueError, LookupError, TypeError) as error:
                raise DamagedRunError(
                    f"{file} is damaged ({type(error).__name__}: {error}); delete {file.parent}, and checkpoint "
                    f"{file.parent.parent.name} no longer counts as the best"
                ) from error

    def _remove_deleted(self) -> None:
        if not self._read_only and jax.process_index() == 0:
            (self.folder / _DELETED).rmtree(missing_ok=True)

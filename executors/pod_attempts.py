"""Attempts inside a Pod: the loaded method, what it is given, what becomes of its result, and what its failure is called."""

from __future__ import annotations

import hashlib
import importlib
import json
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from engine.tasks import FailureCause
from executors.dfs import ObjectFileStore, open_store
from executors.methods import registry
from executors.methods.base import Cancelled, GivenAdapter, InputRefused, Method, MethodResult, ModelMissing, NotFinite
from executors.methods.parameters import PARAMETERS, ParameterError, validate
from executors.methods.together import SharedMethod
from executors.pod_checkpoints import STORE_ERRORS, CheckpointShelf
from executors.pod_main import PROGRESS_PERIOD_S, Link, Order, Orders, PodSpec, cleared, log_tail
from executors.pod_models import ModelCache
from executors.pod_previews import Previews
from executors.terms import AdapterTerms, Terms, TermsWrong

_DETAIL_CHARS = 1024
_GPU_LOST = (
    "fallen off the bus",
    "gpu is lost",
    "ecc error",
    "no cuda-capable device",
    "device unavailable",
    "busy or unavailable",
    "unspecified launch failure",
    "launch timed out",
    "hardware stack error",
    "nvlink",
    "driver shutting down",
    "device not ready",
    "unknown error",
    "xid",
)
"""How CUDA and its driver speak of a device that is gone or broken; an assertion or a wild access is the program's own fault."""
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


class InputFileMissing(FileNotFoundError):
    """A file that the parameters name is not in the file store."""


class FreeParameters(BaseModel):
    """Parameters of a method from outside the registry that declares none: anything goes."""

    model_config = ConfigDict(extra="allow")


class Attempt:
    """What a method gets for one run: its own directories, progress, stop, files and models (`MethodContext`)."""

    def __init__(
        self,
        order: Order,
        spec: PodSpec,
        link: Link,
        orders: Orders,
        models: ModelCache,
        store: ObjectFileStore,
        previews: Previews,
    ) -> None:
        self._key = order.key
        self._terms = Terms.from_json(order.terms)
        self._fetched: list[AdapterTerms] = []
        self._previews = previews
        self._preview = ""
        self._link = link
        self._orders = orders
        self._models = models
        self._store = store
        self._directory = Path(spec.directory) / order.directory_name
        self._output_dir: Path | None = None
        self._unsent: tuple[int, int, str] | None = None
        self._last = (0, 0, "")
        self._shelf = CheckpointShelf(store, self._directory, order.key[0])
        self._announced = ""
        self._sent_at = -PROGRESS_PERIOD_S
        self.device = spec.device
        self.cache_dir = models.cache_dir.parent / "priors"
        self.checkpoint = self._shelf.restore(order.checkpoint, self._directory / "checkpoint")
        self.model = self._terms.model
        self.priority = self._terms.priority
        self.adapters: tuple[GivenAdapter, ...] = ()

    def take_adapters(self, held: Mapping[str, Any]) -> None:
        """Bring the adapters' files to this node, but for one that the Pod's own model `held` is; raises as `_adapter`."""
        base = str(held.get("base") or held.get("id") or "")
        wanted = [each for each in self._terms.adapters if each.model != held.get("id")]
        self.adapters = tuple(self._adapter(each, base) for each in wanted)

    def _adapter(self, terms: AdapterTerms, held: str) -> GivenAdapter:
        """Bring an adapter's files to this node; raises ModelMissing, InputRefused for one that belongs to another base."""
        if terms.base and terms.base != held:
            raise InputRefused(
                "adapters", f"{terms.model} was trained on {terms.base}, this Pod holds {held}; use models of one base"
            )
        try:
            folder = self._models.fetch(terms.model, terms.files)
        except ModelMissing as error:
            raise ModelMissing(f"adapter {terms.model}: {error}") from error
        self._fetched.append(terms)
        identity = hashlib.sha256(json.dumps(sorted(terms.files.items())).encode()).hexdigest()[:16]
        return GivenAdapter(terms.model, folder, terms.weight, terms.pinned, identity)

    def leave(self) -> None:
        """Let go of what was fetched, and of the previews."""
        while self._fetched:
            self._models.release(self._fetched.pop().files)
        if self._preview:
            self._previews.forget(self._name)

    @property
    def _name(self) -> str:
        req_no, attempt, rank = self._key
        return f"{req_no}/{attempt}.{rank}"

    def preview(self, picture: Any) -> None:
        """Show a small picture of what there is so far: it becomes a file, whose id goes out with the progress."""
        self._preview = self._preview or "-"
        self._previews.show(self._name, picture, self._announce_preview)

    def _announce_preview(self, file_id: str) -> None:
        self._preview = file_id
        self._unsent = self._last
        self.flush()

    @property
    def output_dir(self) -> Path:
        """An empty directory of the attempt's own, made when it is first asked for: many a short run writes nothing."""
        if self._output_dir is None:
            self._output_dir = cleared(self._directory / "out")
        return self._output_dir

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Report progress, at most once in PROGRESS_PERIOD_S; what is held back then is sent with the next, or at the end."""
        self._unsent = self._last = (done, total, note)
        if done >= total or time.monotonic() - self._sent_at >= PROGRESS_PERIOD_S:
            self.flush()

    def flush(self) -> None:
        """Send the progress that was held back."""
        if self._unsent is not None:
            done, total, note = self._unsent
            preview = "" if self._preview == "-" else self._preview
            self._link.send(
                "progress",
                key=self._key,
                done=done,
                total=total,
                note=note,
                checkpoint=self._announced,
                preview=preview,
            )
            self._unsent = None
            self._sent_at = time.monotonic()

    def offer_checkpoint(self, checkpoint: Path) -> None:
        """Put a checkpoint into the file store and tell of it at once; a store that fails costs the checkpoint, not the run."""
        try:
            self._announced = self._shelf.put(checkpoint)
        except STORE_ERRORS as error:
            print(f"a checkpoint could not be stored, the run goes on: {error}", file=sys.stderr, flush=True)
            return
        self._unsent = self._last
        self.flush()

    def should_stop(self) -> bool:
        """Tell whether to stop before the next step."""
        return self._orders.should_stop(self._key)

    def fetch(self, file_id: str) -> Path:
        """Return a local copy of a stored file; raises InputFileMissing."""
        target = self._directory / "in" / file_id
        if target.exists():
            return target
        try:
            return self._store.fetch(file_id, target)
        except FileNotFoundError:
            raise InputFileMissing(
                f"file {file_id[:80]} is not in the file store; upload it, then submit again"
            ) from None

    def model_dir(self, model_id: str) -> Path:
        """Return a base model's directory."""
        return self._models.base_dir(model_id)

    def keep(self, result: MethodResult) -> dict[str, Any]:
        """Put the result's files into the file store and describe them."""
        files: list[dict[str, Any]] = []
        for file in result.files:
            path = file.path.resolve()
            if not path.is_relative_to(self.output_dir.resolve()):
                raise RuntimeError(f"the method's result {file.path} lies outside its output directory")
            ref = self._store.put_path(path, file.media_type)
            files.append(
                {
                    "file_id": ref.file_id,
                    "media_type": file.media_type,
                    "size_bytes": ref.size_bytes,
                    "role": file.role,
                    "name": file.name,
                }
            )
        return {"files": files, "metadata": dict(result.metadata)}

    def keep_checkpoint(self, checkpoint: Path) -> str:
        """Put a checkpoint directory into the file store; returns its file id."""
        return self._shelf.put(checkpoint)

    def clear_checkpoints(self) -> None:
        """Remove what was kept to go on from: the request has its result."""
        self._shelf.clear()


class Attempts:
    """The loaded method of a Pod; loading may raise whatever the method, its model or the device raise."""

    def __init__(self, spec: PodSpec, link: Link, orders: Orders) -> None:
        self._spec = spec
        self._link = link
        self._orders = orders
        self.broken_by: FailureCause | None = None
        """What ended the use of the device in this process."""
        self._models = ModelCache.from_json(spec.models)
        self._store = open_store(spec.store_url)
        self._previews = Previews(self._store)
        self._method = _create(spec)
        _cap_gpu_memory(spec)
        self._method.load(self._models.resolve(spec.model), spec.device)

    def run(self, order: Order) -> bool:
        """Run an attempt to its end, whatever that is, and report it; False when the process is of no use any more."""
        self._link.send("started", key=order.key)
        attempt: Attempt | None = None
        began = time.monotonic()
        try:
            attempt = Attempt(order, self._spec, self._link, self._orders, self._models, self._store, self._previews)
            parameters = self._validate(order.parameters)
            attempt.take_adapters(self._spec.model)
            result = self._method.run(parameters, attempt)
            attempt.flush()
            run_us = round((time.monotonic() - began) * 1e6)
            kept = attempt.keep(result)
            self._link.send(
                "finished",
                key=order.key,
                result=kept,
                run_us=run_us,
                peak=result.peak_gpu_memory_bytes,
                alone_us=max(1, run_us - result.company_us),
                company_permille=result.company_permille,
                host_peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            )
            attempt.clear_checkpoints()
        except Cancelled as cancelled:
            self._report_stop(order, attempt, cancelled)
        except Exception as error:
            self._report_failure(order, error)
            if breaks_the_device(error):
                self.broken_by = cause_of(error)
                return False
        finally:
            if attempt is not None:
                attempt.leave()
            self._remove_directory(order)
        return True

    @property
    def paced(self) -> bool:
        """Whether the method promises a sign of life after each step."""
        return bool(getattr(self._method, "paced", False))

    def share(self, slots: int) -> bool:
        """Have the method run several attempts at once; False when there is one slot only, or when it cannot."""
        return slots > 1 and isinstance(self._method, SharedMethod) and self._method.share(slots)

    def serve(self) -> None:
        """Do the device's work for the attempts of all slots, until `leave`."""
        assert isinstance(self._method, SharedMethod)
        self._method.serve()

    def leave(self) -> None:
        """Let `serve` return."""
        assert isinstance(self._method, SharedMethod)
        self._method.leave()

    def close(self) -> None:
        """Give the model's memory back."""
        self._method.close()

    def _remove_directory(self, order: Order) -> None:
        directory = Path(self._spec.directory) / order.directory_name
        if not directory.exists():
            return
        shutil.rmtree(directory, ignore_errors=True)
        try:
            directory.parent.rmdir()
        except OSError:
            pass  # Another attempt of the same request has its directory there.

    def _validate(self, parameters: Mapping[str, Any]) -> BaseModel:
        if not self._spec.factory:
            return validate(self._spec.method, parameters)
        model: type[BaseModel] = getattr(self._method, "parameters_model", FreeParameters)
        return model.model_validate(dict(parameters))

    def _report_stop(self, order: Order, attempt: Attempt | None, cancelled: Cancelled) -> None:
        checkpoint = ""
        if attempt is not None and cancelled.checkpoint is not None and self._orders.keeps_checkpoint(order.key):
            try:
                checkpoint = attempt.keep_checkpoint(cancelled.checkpoint)
            except Exception:
                traceback.print_exc()  # The attempt is stopped all the same; it starts again from its beginning.
        self._link.send("stopped", key=order.key, checkpoint=checkpoint)

    def _report_failure(self, order: Order, error: Exception) -> None:
        traceback.print_exception(error)
        sys.stderr.flush()
        summary = f"{type(error).__name__}: {error}"[:_DETAIL_CHARS]
        detail = (
            summary
            if isinstance(error, TermsWrong | ParameterError | InputRefused)
            else f"{summary}\n{log_tail(Path(self._spec.log))}"
        )
        self._link.send("failed", key=order.key, cause=cause_of(error), detail=detail, peak=_peak_gpu_memory())


def cause_of(error: BaseException) -> FailureCause:
    """Name a failure the way the scheduler treats it; torch's errors are known by name, so that this needs no torch."""
    text = str(error).lower()
    names = {kind.__name__ for kind in type(error).__mro__}
    if "OutOfMemoryError" in names or isinstance(error, MemoryError):
        return FailureCause.OUT_OF_MEMORY
    if isinstance(error, RuntimeError | OSError) and any(sign in text for sign in _OUT_OF_MEMORY):
        return FailureCause.OUT_OF_MEMORY
    if isinstance(error, ModelMissing):
        return FailureCause.MODEL_MISSING
    if isinstance(error, NotFinite):
        return FailureCause.NOT_FINITE
    if isinstance(
        error, TermsWrong | ParameterError | InputRefused | InputFileMissing | ValidationError | UnknownMethod
    ):
        return FailureCause.BAD_INPUT
    if isinstance(error, RuntimeError) and any(sign in text for sign in _GPU_LOST):
        return FailureCause.GPU_LOST
    return FailureCause.CRASHED


def breaks_the_device(error: BaseException) -> bool:
    """Tell whether CUDA refuses all further work of this process after the error; running out of memory does not."""
    return (
        isinstance(error, RuntimeError)
        and "cuda error" in str(error).lower()
        and cause_of(error) is not FailureCause.OUT_OF_MEMORY
    )


class UnknownMethod(ValueError):
    """No method of this name is on the node."""


def _create(spec: PodSpec) -> Method:
    if spec.factory:
        module, _, name = spec.factory.partition(":")
        made: Method = getattr(importlib.import_module(module), name)()
        return made
    if spec.method not in PARAMETERS:
        raise UnknownMethod(f"method: {spec.method[:80]!r} is unknown; this node has {', '.join(sorted(PARAMETERS))}")
    return registry.create(spec.method)


def _cap_gpu_memory(spec: PodSpec) -> None:
    """Hold this process to its share of the card: torch refuses to allocate beyond it, before its neighbours suffer."""
    if not spec.device.startswith("cuda") or spec.gpu_memory_cap_bytes <= 0:
        return
    import torch

    for index in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, spec.gpu_memory_cap_bytes / total), index)


def _peak_gpu_memory() -> int:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return max((int(torch.cuda.max_memory_allocated(index)) for index in range(torch.cuda.device_count())), default=0)

"""What a nursery has imported its Pods need not import: a Pod begins in a tenth of a second, and loading a model is loading it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from executors.pod_models import BUILTIN_MODELS
from executors.pod_nursery import PRELOADS

_AS_A_POD = """
import importlib, json, sys
from pathlib import Path
from executors.pod_nursery import PRELOADS
from executors.pod_process import is_single_threaded
for name in PRELOADS["torch"]:
    importlib.import_module(name)
before, alone = set(sys.modules), is_single_threaded()
from executors.methods import registry
from executors.methods.base import ModelRef
made = registry.create("text_to_image")
made.load(ModelRef("tiny", Path(sys.argv[1])), "cpu")
made.share(2)
print(json.dumps({"alone": alone, "late": sorted(set(sys.modules) - before)}))
"""


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.skipif(not (BUILTIN_MODELS["tiny"] / "model_index.json").is_file(), reason="the bundled model is not here")
def test_a_pod_that_loads_a_model_imports_no_library_that_its_nursery_could_have() -> None:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, "-c", _AS_A_POD, str(BUILTIN_MODELS["tiny"])]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **threads})
    told = json.loads(out.stdout.splitlines()[-1])
    late = [name for name in told["late"] if name.split(".")[0] in ("torch", "diffusers", "transformers", "executors")]
    assert late in ([], ["executors.methods.registry"])
    assert told["alone"], "what was imported has left no thread behind, so that a Pod may be forked"


def test_a_light_nursery_imports_no_library_of_models() -> None:
    assert not any(name.startswith(("torch", "diffusers", "transformers")) for name in PRELOADS["light"])
    assert set(PRELOADS["light"]) <= set(PRELOADS["torch"])

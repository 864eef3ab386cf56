import subprocess
import sys

import pytest


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_light():
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'pyarrow', 'trl', 'peft', 'vllm', 'deepspeed'}"
    assert run(f"import sys, posttrain, posttrain.cli.main; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


@pytest.mark.slow
def test_objectives_import_torch_and_nothing_of_ours():
    code = (
        "import sys, importlib, pkgutil, posttrain.objectives as o\n"
        "[importlib.import_module(f'posttrain.objectives.{m.name}') for m in pkgutil.iter_modules(o.__path__)]\n"
        "ours = {m for m in sys.modules if m.startswith('posttrain.') and not m.startswith('posttrain.objectives')}\n"
        "print(sorted(ours), 'transformers' in sys.modules)"
    )
    assert run(code).strip() == "[] False"


@pytest.mark.slow
def test_the_command_line_needs_no_vllm_deepspeed_trl_or_peft():
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['vllm', 'deepspeed', 'trl', 'peft', 'datasets']))  # None: not installed\n"
        "import posttrain.pipelines.pipeline, posttrain.rollouts.transformers, posttrain.rewards.math\n"
        "print('fine')"
    )
    assert run(code).strip() == "fine"

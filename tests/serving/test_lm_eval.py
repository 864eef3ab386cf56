"""lm-eval's own clients against a running endpoint, on 20 problems of a file."""

import json
import os
import subprocess
import sys

import pytest

from posttrain.data import arithmetic
from posttrain.models.load import TINY
from tests.serving.conftest import KEY, both_engines

TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{prompt}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 300, temperature: 0}}
filter_list:
  - name: last
    filter: [{{function: regex, regex_pattern: "(-?[0-9]+)", group_select: -1}}, {{function: take_first}}]
metric_list: [{{metric: exact_match}}]
"""
PROMPTS = {"local-completions": "<|user|>{{problem}}<|assistant|>", "local-chat-completions": "{{problem}}"}


@pytest.mark.slow
@both_engines
@pytest.mark.parametrize("client", sorted(PROMPTS))
def test_lm_eval_measures_what_the_endpoint_answers(server, http, tmp_path, client):
    problems = arithmetic.problems(20, "test", seed=3, levels=(1, 2))
    rows = [{"problem": one.text, "answer": str(one.answer)} for one in problems]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl", prompt=PROMPTS[client]))
    chat = client == "local-chat-completions"
    route = "/v1/chat/completions" if chat else "/v1/completions"
    settings = f"model=tiny,base_url={server.url}{route},num_concurrent=4,max_retries=1,tokenizer={TINY}"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", client, "--model_args", settings, "--tasks", "sums"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
    command += ["--apply_chat_template"] if chat else []
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        command, env={**os.environ, **offline, "OPENAI_API_KEY": KEY}, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [path] = (tmp_path / "out").rglob("samples_sums_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    said = {sample["doc"]["problem"]: sample["resps"][0][0] for sample in samples}
    law = {"model": "tiny", "temperature": 0, "max_tokens": 300}
    for row in rows:
        asked = {"messages": [{"role": "user", "content": row["problem"]}]}
        own = http.post("/v1/chat/completions", json={**law, **asked}).json()["choices"][0]["message"]["content"]
        assert said[row["problem"]] == own and own
    right = sum(sample["exact_match"] for sample in samples)
    assert len(samples) == 20 and right >= 5

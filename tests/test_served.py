"""A real server of the protocol, vLLM's own, on this machine's loopback: the endpoint engine reads from it what the vLLM engine computes."""
import json
import os
import subprocess
import sys
import time

import httpx
import pytest
from helpers import free_ports
from test_evaluation import checkpoint  # noqa: F401  fixture

from tulu_study.core.params import Endpoint
from tulu_study.evaluation.endpoint import NOT_LISTED, EndpointEngine

PROMPTS = ["The cat sat", "the big red dog ran under the tree and", "a", "it was " * 30]
HERE = """
import json, sys
from tulu_study.evaluation.engines import VLLMEngine
folder, prompts, letters = sys.argv[1], *map(json.loads, sys.argv[2:])
engine = VLLMEngine(folder)
known = engine.tokenizer.get_vocab()
ids = [known.get(front + letter, known[letter]) for front in ("", "\u0120") for letter in letters]  # what has no token after a blank stands for itself twice
asked = sorted(set(ids))
print("FOUND" + json.dumps([[vars(output) for output in engine.generate(prompts, 24)], [[dict(zip(asked, output.logprobs))[token] for token in ids] for output in engine.option_scores(prompts, asked)]]))
"""


@pytest.fixture
def served(checkpoint, tmp_path, monkeypatch):  # noqa: F811
    "Address of a server; skipped where it does not start."
    pytest.importorskip("vllm", reason="vLLM is not installed")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(name, raising=False)
    port = free_ports(1)[0]
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port), "--model", str(checkpoint), "--served-model-name", "tiny", "--dtype", "float32",
               "--max-model-len", "512", "--enforce-eager", "--generation-config", "vllm", "--kv-cache-memory-bytes", str(64 << 20)]
    with open(tmp_path / "server.log", "w") as log: process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.time() + 240
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200: break
            except httpx.HTTPError: pass
            said = (tmp_path / "server.log").read_text(errors="replace").strip().splitlines()[-1:]
            if process.poll() is not None or time.time() > until: pytest.skip(f"vLLM's server does not start here: {said[0][:200] if said else 'it says nothing'}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try: process.wait(30)
        except subprocess.TimeoutExpired: os.killpg(process.pid, 9)


@pytest.mark.slow
def test_a_server_says_what_the_engine_computes(served, checkpoint):  # noqa: F811
    "Completions, reasons to stop and token counts are equal; log-probabilities of letters are, where the server lists them."
    letters = list("aehinorstd")  # with and without a blank: twenty tokens, as many as vLLM lists
    done = subprocess.run([sys.executable, "-c", HERE, str(checkpoint), json.dumps(PROMPTS), json.dumps(letters)], capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    texts, scores = json.loads(done.stdout.split("FOUND", 1)[1])
    engine = EndpointEngine(Endpoint(url=served, model="tiny", api="completions", tokenizer=str(checkpoint), context=512, logprobs=20, key_variable=None))
    for ours, theirs in zip(texts, engine.generate(PROMPTS, 24), strict=True):
        whole = lambda texts: [text.rstrip("\ufffd") for text in texts]  # the server holds back half a character at the very end
        assert (theirs.error, whole(theirs.texts), theirs.finish, theirs.prompt_tokens, theirs.completion_tokens) == (None, whole(ours["texts"]), ours["finish"], ours["prompt_tokens"], ours["completion_tokens"])
    found = engine.option_scores(PROMPTS, [engine.tokenizer.convert_tokens_to_ids(letter) for letter in letters])
    pairs = [(value, plain, after_blank) for output, values in zip(found, scores, strict=True) for value, plain, after_blank in zip(output.logprobs or (), values, values[len(letters):]) if value != NOT_LISTED]
    assert pairs, "the server listed no letter among its most probable tokens: nothing was compared"
    for value, plain, after_blank in pairs: assert min(abs(value - plain), abs(value - after_blank)) < 1e-3

#!/usr/bin/env bash
# lm-eval's client of servers (local-completions) with max_length=N asks of windows of N - 2 tokens,
# where its model of transformers (hf) with the same max_length has windows of N.
#
# One length is thought to mean the same texts to both: a served model is compared with its own
# checkpoint by giving both the length that the model has. But the client keeps one token of it for a
# token that is to be generated, also where none is, and for whole texts (loglikelihood_rolling) one
# more. A document that hf reads at once is cut in two, and in longer ones tokens have other texts before
# them, so that perplexities differ. With N + 2 the windows are hf's.
#
# lm_eval 0.4.13, transformers 5.24.0, Python 3.12; the server here only counts. Seen, for a document of
# 16 tokens:
#   requests at max_length=16: 2, of 15 tokens each
#   requests at max_length=18: 1, of 17 tokens
#   windows of lm_eval.utils.get_rolling_token_windows at 16: 1
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-cache-dir \
    "lm_eval[api]==0.4.13" transformers==5.24.0 tokenizers==0.23.3

cat >"$folder/try.py" <<'PYTHON'
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import tokenizers
from lm_eval.api.registry import get_model
from lm_eval.utils import get_rolling_token_windows

folder = Path(sys.argv[1])
words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({"<e>": 0} | {f"w{n}": n for n in range(1, 40)}, unk_token="<e>")
)
words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
words.save(str(folder / "tokenizer.json"))
(folder / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>"})
)
asked = []


class Counts(BaseHTTPRequestHandler):
    """Answers that every token is certain."""

    def do_POST(self):
        prompts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        prompts = prompts if isinstance(prompts[0], list) else [prompts]
        asked.extend(len(prompt) for prompt in prompts)
        choices = [
            {"index": n, "text": "", "logprobs": {
                "tokens": ["x"] * (len(p) + 1), "token_logprobs": [None] + [0.0] * len(p),
                "top_logprobs": [None] + [{"x": 0.0}] * len(p)}}
            for n, p in enumerate(prompts)
        ]
        body = json.dumps({"choices": choices}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), Counts)
threading.Thread(target=server.serve_forever, daemon=True).start()
document = SimpleNamespace(args=(" ".join(f"w{n}" for n in range(1, 17)),))


def lengths(max_length):
    asked.clear()
    model = get_model("local-completions")(
        base_url=f"http://127.0.0.1:{server.server_port}/v1/completions", model="x",
        tokenizer=str(folder), tokenizer_backend="huggingface", max_length=max_length,
        num_concurrent=1,
    )
    model.loglikelihood_rolling([document], disable_tqdm=True)
    return sorted(asked, reverse=True)


whole = list(get_rolling_token_windows(list(range(1, 17)), 0, 16, 1))
print("requests at max_length=16:", lengths(16))
print("requests at max_length=18:", lengths(18))
print("windows at 16:", len(whole))
PYTHON

"$folder/venv/bin/python" "$folder/try.py" "$folder" 2>"$folder/log" | tee "$folder/found" ||
    { tail -5 "$folder/log"; exit 1; }
failed=0
while IFS= read -r line; do
    grep -qxF "$line" "$folder/found" || { echo "  changed: was $line"; failed=1; }
done <<'SEEN'
requests at max_length=16: [15, 15]
requests at max_length=18: [17]
windows at 16: 1
SEEN
exit $failed

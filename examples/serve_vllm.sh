#!/usr/bin/env bash
# Two languages from one server, called with curl and with the OpenAI client. `make demo` has built the two patches.
#
#   bash examples/serve_vllm.sh .demo        (with the environment of `make vllm`: PATH=.venv-vllm/bin:$PATH)
set -euo pipefail
folder=${1:-.demo}
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}

ksl-patch serve "$folder/gemma3" --patch "de=$folder/de.safetensors" --patch "ru=$folder/ru.safetensors" \
  --apply-template --max-model-len 512 --port 8000 &
trap 'kill %1' EXIT
until curl -sf localhost:8000/health; do sleep 1; done

for language in de ru; do
  curl -s localhost:8000/v1/completions -H 'Content-Type: application/json' \
    -d "{\"model\": \"$language\", \"prompt\": \"Click the network icon and choose your wireless network.\", \"max_tokens\": 32, \"temperature\": 0}"
  echo
done

python - "$folder/gemma3" <<'PYTHON'
import sys

from openai import OpenAI

client = OpenAI(base_url="http://localhost:8000/v1", api_key="EMPTY")
print([model.id for model in client.models.list()])
for model in ("de", "ru", sys.argv[1]):
    answer = client.completions.create(model=model, prompt="The capital of France is", max_tokens=16, temperature=0)
    print(model, "|", answer.choices[0].text.strip().splitlines()[:1])
PYTHON

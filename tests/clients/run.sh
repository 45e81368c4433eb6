#!/usr/bin/env bash
# Runs every client here against a demo server of its own. $1: the folder of the virtual environment that has expertd.
set -euo pipefail
expertd="$(realpath "$1")/bin/expertd"
cd "$(dirname "$0")"
homes="$(realpath ../..)/.venv-clients"
mkdir -p "$homes"

venv() {  # name, packages…
    [[ -e "$homes/$1/.ready" ]] && return
    python3 -m venv "$homes/$1"
    "$homes/$1/bin/pip" install --quiet "${@:2}"
    touch "$homes/$1/.ready"
}

venv openai-2 "openai>=2,<3"
venv openai-3 "openai>=3,<4"
venv frameworks litellm langchain-openai llm  # these want openai 2
venv lm-eval "lm_eval[api]"
mkdir -p "$homes/node"
[[ -d "$homes/node/node_modules/openai" ]] || npm install --silent --prefix "$homes/node" openai

log="$homes/server.log"
"$expertd" serve demo --port 0 --max-model-len 2048 2> "$log" &
server=$!
trap 'kill $server; wait $server || true' EXIT
until EXPERTD_URL="$(grep -om1 'http://[0-9.:]*' "$log")"; do
    kill -0 $server || { cat "$log"; exit 1; }
    sleep 0.2
done
export EXPERTD_URL
curl --silent --output /dev/null --fail --retry 600 --retry-delay 1 --retry-all-errors "$EXPERTD_URL/ready"

"$homes/openai-2/bin/python" openai_client.py
"$homes/openai-3/bin/python" openai_client.py
cp openai_client.mjs "$homes/node" && node "$homes/node/openai_client.mjs"  # Node finds packages beside the script
"$homes/frameworks/bin/python" litellm_client.py
"$homes/frameworks/bin/python" langchain_client.py
./llm_client.sh "$homes/frameworks/bin"
cd lm_eval
HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME="$homes/hf" "$homes/lm-eval/bin/lm_eval" --model local-completions \
    --model_args "model=demo,base_url=$EXPERTD_URL/v1/completions,num_concurrent=2,max_retries=1" \
    --tasks capitals_mc,capitals_gen --include_path .
echo "all clients: ok"

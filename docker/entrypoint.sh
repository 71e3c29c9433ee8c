#!/usr/bin/env bash
# Serve every classifier of the repository under explicit model control; arguments go to tritonserver.
# When the first argument is `patcher`, run that instead: docker compose run --rm patcher add-label ...
#
#   TRITON_MODEL_REPO  folder of the repository (/models)
#   CLASSIFIERS        names to serve, blanks between them, BACKBONE_any for those in a head store (default: every NAME
#                      that has a NAME_head beside it, and BACKBONE_any for every head store BACKBONE_heads)
#   ADMIN_KEY_FILE     file with the key that model control asks for; without one, nobody has model control
#   TLS_FOLDER         folder with tls.crt and tls.key: gRPC speaks TLS; with client-ca.crt it asks clients for theirs
#   SERVE_HTTP         1: HTTP answers more than health checks without the key; who reaches it may then end the server by
#                      one request, for Triton reads nested JSON without a limit (refused beside TLS)
#   ENCODER_RUNS_BACKBONE  1: encoders run a backbone that is for a CPU in their own process, which saves the way to
#                      the backbone's model and back, and holds the backbone twice
set -euo pipefail

repository="${TRITON_MODEL_REPO:-/models}"
key=""
if [ -n "${ADMIN_KEY_FILE:-}" ]; then
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

read -d '' -ra names <<<"${CLASSIFIERS:-}" || true # to the end of the text, which may have lines
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
fi
if [ "${#names[@]}" -eq 0 ]; then
  echo "no classifier in $repository; expected folders NAME and NAME_head, as 'patcher export' writes them" >&2
  exit 2
fi

# Triton ends where one model does not load, so that a damaged head would take every classifier down. As `patcher serve`
# does, leave that one out; where nothing can be told, Triton is to say what is wrong.
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
if damaged="$(python3 -I -c "$find" "$repository")"; then
  whole=()
  for name in "${names[@]}"; do
    if why="$(grep "^$name " <<<"$damaged")"; then
      echo "warning: $name is not served: ${why#"$name "}; once that is repaired, restart this container" >&2
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
printf '%s\n' "${names[@]}" >"${TMPDIR:-/tmp}/classifiers" # for healthcheck.py

models=()
for name in "${names[@]}"; do models+=("--load-model=$name"); done
# What add-label asks for features, and the backbone, which its encoder asks: one of each, however many classifiers share
# them.
for config in "$repository"/*_features/config.pbtxt "$repository"/*_backbone/config.pbtxt; do
  if [ -f "$config" ]; then models+=("--load-model=$(basename "$(dirname "$config")")"); fi
done

# Loading a model can run code, trace and log settings write files, and answers may be written over shared memory that
# somebody registers: an administrator's right. Triton takes the key on its command line only, so whoever may look into
# this container can read it.
if [ -z "$key" ]; then
  echo "no ADMIN_KEY_FILE: nobody can load or unload models in this server" >&2
  key="$(od -An -v -N 32 -tx1 /dev/urandom | tr -d ' \n')"
fi
restricted="model-repository,shared-memory,trace,logging"
# Nested JSON ends Triton, whoever sends it, so HTTP answers health checks alone, but to healthcheck.py, which has the key.
restricted_http="inference,metadata,model-config,model-repository,statistics,shared-memory,trace,logging"
(umask 077 && rm -f "${TMPDIR:-/tmp}/http-key" && printf '%s' "$key" >"${TMPDIR:-/tmp}/http-key")
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

# Triton's HTTP knows no TLS: beside gRPC with TLS it keeps to this container, for its health check.
tls=()
if [ -n "${TLS_FOLDER:-}" ]; then
  for file in tls.crt tls.key; do
    if [ ! -r "$TLS_FOLDER/$file" ]; then
      echo "TLS_FOLDER is $TLS_FOLDER, and $file in it cannot be read; expected tls.crt and tls.key" >&2
      exit 2
    fi
  done
  tls=(--grpc-use-ssl=true "--grpc-server-cert=$TLS_FOLDER/tls.crt" "--grpc-server-key=$TLS_FOLDER/tls.key")
  # Metrics go where HTTP goes unless told otherwise, and somebody outside scrapes them.
  tls+=(--http-address=127.0.0.1 --metrics-address=0.0.0.0)
  if [ -e "$TLS_FOLDER/client-ca.crt" ]; then
    tls+=(--grpc-use-ssl-mutual=true "--grpc-root-cert=$TLS_FOLDER/client-ca.crt")
  fi
fi

# The encoder is told the file of patcher's that runs a backbone. Found by -I, for the repository may be the folder here.
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

# Readiness is not strict: a refused load of a new head would turn the whole server unready while the classifier goes on
# answering. The health check asks for the classifiers themselves.
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

#!/usr/bin/env bash
# test.sh [pytest arguments]: installs the development environment, then lints, checks types and runs the tests, one
# worker a core (at most 8; `-n 0` for none). The types are checked beside the tests; any of the three fails the script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_setup.sh dev
echo "== ruff"
ruff check .
ruff format --check .
types=$(mktemp)
mypy > "$types" 2>&1 &
checking=$!
trap 'kill "$checking" 2> /dev/null || true; rm -f "$types"' EXIT
echo "== pytest (mypy runs beside it)"
failed=0
python -m pytest -n "$(nproc)" --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@" || failed=$?
echo "== mypy"
wait "$checking" || failed=$?
cat "$types"
exit "$failed"

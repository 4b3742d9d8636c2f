#!/usr/bin/env bash
# test.sh [pytest arguments]: installs the development environment, then lints, checks types and runs the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_setup.sh dev
echo "== ruff"
ruff check . && ruff format --check .
echo "== mypy"
mypy
echo "== pytest"
exec python -m pytest "$@"

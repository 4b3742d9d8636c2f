"""`python -m llava_mole`: the `llava-mole` command."""

from llava_mole.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

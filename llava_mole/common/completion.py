"""`llava-mole completion SHELL`: prints a script that lets Tab complete commands, options and files.

The script asks `--help` of the command on the line, so it fits whatever version is installed.
"""

import argparse
from collections.abc import Sequence

from llava_mole.common.errors import command

# Commands, and the sources of `prepare`, are the indented first words of a list; options all words with two dashes.
_ASK = r"""
_llava_mole_words() { # what may stand after the words given
  if [ $# -eq 0 ] || [ "$*" = prepare ]; then
    llava-mole "$@" --help 2>/dev/null | sed -nE '/^(commands|sources)/,$ s/^  ([a-z][a-z0-9-]*) .*/\1/p'
  else
    llava-mole "$@" --help 2>/dev/null |
      grep -oE -- '(^|[^a-zA-Z-])--[a-z][A-Za-z0-9_.-]*' | sed -E 's/^[^-]*//' | sort -u
  fi
}
""".strip()
SCRIPTS = {
    "bash": _ASK
    + r"""
_llava_mole() {
  local word=${COMP_WORDS[COMP_CWORD]} asked=("${COMP_WORDS[@]:1:1}")
  [ "${COMP_WORDS[1]}" != prepare ] || [ "$COMP_CWORD" -lt 3 ] || asked=("${COMP_WORDS[@]:1:2}")
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "$(_llava_mole_words)" -- "$word"))
  elif [[ $word == -* || ($COMP_CWORD -eq 2 && ${COMP_WORDS[1]} == prepare) ]]; then
    COMPREPLY=($(compgen -W "$(_llava_mole_words "${asked[@]}")" -- "$word"))
  fi # anything else is a file
}
complete -o default -o bashdefault -F _llava_mole llava-mole
""",
    "zsh": "#compdef llava-mole\n"
    + _ASK
    + r"""
_llava_mole() {
  local -a asked
  asked=(${words[2]})
  if [[ ${words[2]} == prepare ]] && (( CURRENT > 3 )); then asked=(${words[2,3]}); fi
  if (( CURRENT == 2 )); then
    compadd -- $(_llava_mole_words)
  elif [[ ${words[CURRENT]} == -* ]] || { [[ ${words[2]} == prepare ]] && (( CURRENT == 3 )); }; then
    compadd -- $(_llava_mole_words $asked)
  else
    _files
  fi
}
compdef _llava_mole llava-mole
""",
    "fish": r"""
function __llava_mole_words
  set -l given (commandline -opc)[2..-1]
  if test (count $given) -eq 0; or test "$given" = prepare
    llava-mole $given --help 2>/dev/null | sed -nE '/^(commands|sources)/,$ s/^  ([a-z][a-z0-9-]*) .*/\\1/p'
  else
    set -l asked $given[1]
    if test $given[1] = prepare; set asked $given[1..2]; end
    llava-mole $asked --help 2>/dev/null | string match -rag '(?:^|[^a-zA-Z-])(--[a-z][A-Za-z0-9_.-]*)' | sort -u
  end
end
complete -c llava-mole -n 'test (count (commandline -opc)) -eq 1' -f
complete -c llava-mole -a '(__llava_mole_words)'
""".lstrip(),
}
"""Shell -> its script."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the script of a shell."""
    parser = argparse.ArgumentParser(
        prog="llava-mole completion",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Print a script that lets Tab complete commands, options and files. To load it:",
        epilog='  bash  eval "$(llava-mole completion bash)"       in ~/.bashrc\n'
        '  zsh   eval "$(llava-mole completion zsh)"        in ~/.zshrc, after compinit\n'
        "  fish  llava-mole completion fish | source        in ~/.config/fish/config.fish",
    )
    parser.add_argument("shell", choices=SCRIPTS, help="the shell that reads it")
    print(SCRIPTS[parser.parse_args(argv).shell], end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m jaxattn` and the `jaxattn` command."""

import sys

from jaxattn.cli.main import run


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()

"""``python -m azquant`` is the command ``azquant``."""

from azquant.cli import main

if __name__ == "__main__":
    main()

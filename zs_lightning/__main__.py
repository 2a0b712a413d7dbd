"""The door for `python -m zs_lightning`."""

from zs_lightning.cli import main

if __name__ == "__main__":
    main()

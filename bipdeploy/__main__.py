"""`python -m bipdeploy`: the command line."""

from __future__ import annotations

from bipdeploy.cli.commands import main

if __name__ == "__main__":
    main()

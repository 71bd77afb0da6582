"""``python -m dcp_native``: the command line (_cli/main.py)."""

import sys

if __name__ == "__main__":
    try:
        from ._cli.main import main

        status = main()
    except KeyboardInterrupt:  # so early that nothing was begun
        print("dcp-native: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)

"""`python -m megatron_hypenet` is the `hypenet` command."""

from megatron_hypenet.cli.main import main

if __name__ == "__main__":
    main()

"""The `hypenet` command: one thin module per verb. Modules import nothing heavy at their top, so
that `--help` stays instant."""

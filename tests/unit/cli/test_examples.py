import typer

from megatron_hypenet.cli import examples, main

TEXT = """Do it.

Explanation that may
be broken anew.

Examples:

  hypenet do it --with 'two  words'
    --and-more

  hypenet undo"""


def test_each_example_is_one_line_and_nothing_else_changes():
    treated = examples.whole(TEXT)
    assert treated.split("\n\n") == [
        *TEXT.split("\n\n")[:3],
        "\b\n  hypenet do it --with 'two words' --and-more",
        "\b\n  hypenet undo",
    ]
    assert examples.whole(treated) == treated


def test_commands_and_the_group_around_them_are_treated():
    app = typer.Typer(help="Does it.", epilog="Example:\n\nhypenet do\n  it")

    @app.command()
    def do() -> None:
        """Do it.

        Example:

          hypenet do
            it
        """

    for _ in range(2):
        examples.keep_whole(app)
    assert app.registered_commands[0].help.endswith("\b\n  hypenet do it")
    assert app.info.help == "Does it." and app.info.epilog.endswith("\b\n  hypenet do it")


def test_a_narrow_terminal_does_not_break_an_example(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert main.run(["train", "--help"]) == 0
    words = "--stage 3 --init runs/other/distill teacher=/models/Qwen3-0.6B data=corpus.txt"
    assert f"    hypenet train configs/run/quickstart.yaml {words}\n" in capsys.readouterr().out

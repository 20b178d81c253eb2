"""The commands, a module each, listed by `batchnorm.cli.application`.

To add a command, write ``NAME.py`` with a function ``NAME``: typer reads its signature and
docstring. Import what the command needs inside the function, so that the help of all commands is
shown at once. It returns an exit status of `batchnorm.cli.output`, or None for success; bad input
raises an error of `batchnorm.errors`, which is printed on one line.
"""

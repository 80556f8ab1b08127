"""The intermediate representation: what a program means, before it can run.

`leaves` are expressions at their places in a program, `verify` the rules they obey
after each compiler pass, `render` writes them as mathematics.
May import `factors`, `schedule`, `errors`; knows no kernel and no pass.
"""

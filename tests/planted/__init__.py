"""Errors planted in the library, one at a time, a module for each topic; ``tests/test_planted.py`` demands that every
one is noticed.

Each is the kind of slip that parallel training codes have had. Most are harmless to the serial model, so that it is the
layout that computes wrong numbers. A case is a function, decorated with ``machinery.planted``, that plants its error by
a monkeypatch; its docstring says what is wrong, and the first line of its module's docstring names the topic.

    mpirun -n 8 python -m tests.planted            # the tables of docs/verification.md, measured anew, in Markdown
    mpirun -n 8 python -m tests.planted --write    # put them there
"""

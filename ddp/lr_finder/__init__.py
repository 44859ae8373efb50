"""Learning-rate range tests: `find_learning_rate` on a session or a trainer, and the `find-lr` command.

`curve` reads a curve and `finding` says what it means, both without torch; `range_test` takes the steps, `restoring` puts all
back; `page` draws.
"""

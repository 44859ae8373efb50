"""`ddp sweep`: which settings train best, found by runs. Optuna samples, stores and prunes; every trial is a `ddp train`.

sweep_file, dimensions, space    what is searched: ranges, conditions, stages; checked before anything starts
study, locks                     Optuna's journal, which several masters may share, and who may touch it
planning                         which trial comes next, from the journal alone; ranges of a stage
job_of_trial, run_record         a trial's job, and what its run.db says
fork_server, launching           how a trial's process is started, watched and killed
master                           the loop around all of that
findings, charts, page           what came out: ranked, warned about, drawn
command                          the command line
"""

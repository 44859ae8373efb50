"""`ddp sweep`: which settings train best, found by runs. Optuna samples, stores and prunes; every trial is a `ddp train`.

sweep_file, sections             the file as it is written, and what is wrong with it before anything starts
dimensions, space, stages        what is searched: ranges, conditions; how ranges narrow from stage to stage
opening, locks                   the directory, and who may touch it
journal, trials                  Optuna's journal, which several masters may share; what came of each trial
planning                         which trial comes next, from the journal alone
job_of_trial, run_record         a trial's job, and what its run.db says
fork_server, launching, processes, watching   how a trial is started, watched, stopped and killed
master                           the loop around all of that
findings, charts, page           what came out: ranked, warned about, drawn
command, dry_run                 the command line
"""

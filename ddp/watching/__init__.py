"""What a practitioner looks at while a network trains: numbers in, sentences out. Nothing here imports torch.

From steps to statistics

    cadence.py         which steps' layers are looked at
    histogram.py       counts in logarithmic bins, the same everywhere, so that ranks need not agree on a range
    layers.py          what one look found in each layer
    loss_curve.py      a run's losses, thinned to a bounded number of means

From statistics to sentences

    finding.py         a title, said once in a run, and what to do
    layer_findings.py  updates too large or too small, dead and saturated units, signals that vanish or explode
    curve_findings.py  the shape of the loss curve and its wiggle
    gap_findings.py    training against validation, training error rising
"""

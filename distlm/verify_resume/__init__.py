"""`distlm verify-resume`: trains some steps straight and the same steps in pieces, killed, resumed and resized, and
compares what both trained on and what came out.

    command    runs both through the same launcher, controller and workers as `distlm submit` and `distlm resume`
    samples    which samples were trained on: the lines that workers write
    evidence   what a finished attempt has left: samples, losses, weights
    compare    the verdict, from the evidence alone
"""

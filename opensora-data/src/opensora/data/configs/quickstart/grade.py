"""Grade samples of the quickstart again: which digit and which direction do their pixels show?

Command: opensora-run quickstart/grade                                  # the newest run in outputs/
         opensora-run quickstart/grade --samples outputs/003-quickstart # this one
"""

pipeline = "grade"
samples = "outputs"

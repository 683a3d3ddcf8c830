"""The laboratory's table of claims: every variant of configs/lab.py at one budget, three seeds.

    python -m examples.lab --out lab

trains one variant after the other, some hours on a core, measures each, and writes
lab/report.md: the numbers of every variant, and of each claim below its margin and whether it is
shown. The same command goes on after a stop: finished runs are not trained or measured again. The
claims were written before anything was trained; what comes out contrary stays in the table.
"""

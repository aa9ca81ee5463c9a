"""What can go wrong, as few kinds, so that every error reaches the person at the keyboard as one clear line.

    HistosslError            run time: one red line, exit 1
    |-- SlideError           one slide cannot be used; stages catch it and write a row of the ledger
    |-- StoreError           a tile zip, the index or an embedding file is damaged or out of date
    |-- WeightsError         a weights file does not fit its backbone, or cannot be trusted
    |-- TrainingError        a run cannot go on (not finite, collapsed, out of memory)
    `-- UsageError           also a ValueError: a setting or an input that only the user can mend, exit 2
        |-- LabelsError      labels.csv
        `-- MismatchError    the directory holds work made with other settings

A message says what, where, the value, and the way out. Errors of our own making stay AssertionError, with a traceback.
"""


class HistosslError(Exception):
    """What can go wrong at run time; the kinds are its subclasses."""

    exit_code = 1


class SlideError(HistosslError):
    pass


class StoreError(HistosslError):
    pass


class WeightsError(HistosslError):
    pass


class TrainingError(HistosslError):
    pass


class UsageError(HistosslError, ValueError):
    """A setting or an input that cannot be used: the message says which, its value, and the way out."""

    exit_code = 2


class LabelsError(UsageError):
    pass


class MismatchError(UsageError):
    pass

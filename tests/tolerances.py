"""How far numbers that should agree may differ, and why; a bound that one test alone has is named beside that test.

Each is relative; where it serves as an absolute one, the values compared are of about one.
"""

FLOAT64_SUM = 1e-12  # the same float64 numbers added in another order
FLOAT64_FORMULA = 1e-9  # several float64 sums, one made of the other, of which terms may cancel
FLOAT64_ROOT = 1e-7  # the root of what only float64 rounding keeps from zero
FLOAT32_SUM = 1e-6  # numbers rounded to float32 once or twice
FLOAT32_FORMULA = 1e-5  # sums of some hundred float32 products in another order, or several float32 steps in a row
FLOAT32_NETWORK = 1e-4  # a few layers in float32, or squares of what they give: batch size and fusing round differently
FLOAT32_SAMPLING = 1e-3  # noise of a whole sampling in float32: batch size and threads round, and steps amplify it
HIGHS = 1e-5  # its absolute tolerance of 1e-6 in units of the mean cost per decision or group, with a margin

STANDARD_ERRORS = 4  # that an estimate may miss by: a normal one does from 1 seed of 16000
DIFFERENT = 0.05  # what rounding never comes near: the change that a test makes shows

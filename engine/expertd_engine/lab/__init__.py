"""The policy lab: records what a model's routers chose, replays it through policies and predictors, trains and judges.

What wins here is what serving does; the rest stays here.
"""

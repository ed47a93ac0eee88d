"""The autopilot: decides the budget ceiling and the number of replicas together, from one snapshot of the fleet, and says why.

`decision` is pure; `signals` says what a snapshot is and what cannot be believed; sources read it, actuators carry it out; the
deployment ties them to a clock. Knows nothing of models or HTTP.
"""

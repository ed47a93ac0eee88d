"""Hand-off: a session that is idle moves to another replica with its KV, so that its next turn computes only what it adds.

    `decision`     which sessions, in which order, to whom, and whether it pays                              pure
    `papers`       what goes beside the engine's image: conversation and transcripts, checked on arrival     pure
    `records`      what travels, and what may come of it
    `holdings`     what a replica holds, and the doors that turns wait at while a session changes hands
    `departures`   a replica that drains, or is overloaded, gives sessions away
    `arrivals`     a replica takes sessions over
    `stored`       papers of sessions on disk, for whoever finds them there

    old holder                                  new holder
    export, papers ------- Offer -------------> room? not released? nothing newer here?
                   <------ Receipt ------------
                   ------- Piece, ... --------> put together, check, import, claim
    forget <-------------- Receipt ------------

One try each, in limited time. Whatever goes wrong, the session stays where it was or is computed again by its next turn, and is counted:
the client's request carries the dialogue. Knows Ray only as `departures.Peers`.
"""

"""A look at indexed files, whoever wrote them, in bounded memory.

prefixes    what was named on the command line
index       an `.idx`, read in blocks
verify      whether a pair is what it was when it was written; check_index, check_tokens and verdict
            are its parts
stats       how long the documents are: a table; lengths does the sums, plot the picture
show        the text of a document
"""

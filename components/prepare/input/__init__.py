"""Files of any known format become conversations, each with the place it stands at.

files           lines of a file, unpacked on the way, within bounds
strictjson      JSON as its standard has it
documents       files that are valid JSON and yet hold no rows
readers         rows of JSONL, JSON arrays, CSV and Parquet
formats         rows of every known format become messages
trees           OpenAssistant's trees become conversations
conversations   all of this in one: a data set's conversations
"""

"""Bad invocations of the programs of encrypted inference, as in `experiments_refusals`."""

INFER = """
--checkpoint=                               | checkpoint | is empty | --checkpoint=
--checkpoint={missing}                      | checkpoint | {missing} | finished training run
--checkpoint={folder}                       | checkpoint | {folder} | finished training run
--checkpoint={image}                        | calibration | run | folder:PATH
--checkpoint={run} --classes=a,b            | classes | a,b | leave it out
--checkpoint={broken}                       | model.json | {broken} | --run_dir
--images=                                   | images | is empty | --images=
--images={missing}                          | images | {missing} | check
--images={fifo}                             | images | {fifo} | name
--images={file}                             | {file} | cannot be read | copy it again
--images={folder}                           | {folder} | no image | check
--slices=x                                  | slices | x | 40-60
--slices=4                                  | slices | 4 | leave it out
--overlays=-1                               | overlays | -1 | 0 to draw none
--output=logits                             | output | logits | label
--comparison=magic                          | comparison | magic | tables
--ring_bits=4                               | ring_bits | 4 | 8 to 64
--ring_bits=65                              | ring_bits | 65 | 8 to 64
--ring_bits=-1                              | ring_bits | -1 | 8 to 64
--fraction_bits=40                          | fraction_bits | 40 | 1 to 31
--fraction_bits=-2                          | fraction_bits | -2 | 1 to 31
--ring_bits=16 --fraction_bits=8            | fraction_bits | 8 | 1 to 7
--target_error=0                            | target_error | 0 | positive
--target_error=nan                          | target_error | nan | positive
--margin=0.5                                | margin | 0.5 | at least 1
--margin=inf                                | margin | inf | at least 1
--calibration=yes                           | calibration | yes | phantom
--calibration=folder:                       | calibration | folder: | folder:PATH
--calibration=folder:{missing}              | calibration | {missing} | check
--calibration=npz:{missing}                 | calibration | {missing} | check
--calibration=folder:{fifo}                 | calibration | {fifo} | name
--calibration_images=0                      | calibration_images | 0 | positive
--batch=0                                   | batch | 0 | positive
--batch=two                                 | --batch | two | integer
--network=moon                              | network | moon | wan
--network=40                                | network | 40 | 40,100
--network=40,0                              | network | 40,0 | 40,100
--network=nan,1                             | network | nan,1 | 40,100
--output_dir={file}                         | output_dir | {file} | folder
--output_dir={file}/below                   | output_dir | {file} | folder
--output_dir={fifo}                         | output_dir | {fifo} | folder
--noexact=2                                 | --noexact | 2 | --helpfull
"""

CONNECT = """
--connect=                                  | folder | without connect | --connect
--connect=vendor                            | connect | vendor | HOST:PORT
--connect=vendor:0                          | connect | vendor:0 | HOST:PORT
--connect=vendor:70000                      | connect | 70000 | HOST:PORT
--folder=                                   | folder | is empty | --folder=
--folder={missing}                          | folder | {missing} | primia-certificate
--folder={folder}                           | folder | {folder} | chmod 700
--folder={bare}                             | folder | {bare} | certificate
--model=                                    | model | '' | letters
--model=../run                              | model | ../run | letters
--model=chest-9                             | model | chest-9 | chest-1
--timeout=0                                 | timeout | 0 | positive
--images=                                   | images | is empty | --images=
--images={missing}                          | images | {missing} | check
--images={image}                            | {hospital} | plan | outbox/clinics
--checkpoint={run}                          | checkpoint | connect | leave it out
--ring_bits=32                              | ring_bits | connect | leave it out
--check                                     | check | connect | leave it out
--output_dir={file}                         | output_dir | {file} | folder
"""

ASK = """
--card=                                     | card | is empty | --card=
--card={missing}                            | card | {missing} | ask the model owner
--card={file}                               | card | {file} | ask the model owner
--card={selfish}                            | card | both servers | another institution
--card={outdated}                           | expired | only | new one
--folder=                                   | folder | is empty | --folder=
--folder={folder}                           | folder | {folder} | chmod 700
--folder={bare}                             | folder | {bare} | certificate
--folder={expired}                          | certificate | only | new one
--timeout=0                                 | timeout | 0 | positive
--images=                                   | images | is empty | --images=
--images={missing}                          | images | {missing} | check
--images={file}                             | {file} | cannot be read | copy it again
--output_dir={file}                         | output_dir | {file} | folder
--checkpoint={run}                          | checkpoint | not a flag | --helpfull
"""

CERTIFICATE = """
--folder=                                   | folder | is empty | --folder=
--folder={folder}                           | folder | {folder} | chmod 700
--folder={file}                             | folder | {file} | folder
--folder={vendor}                           | folder | key.pem | --renew
--name=Hospital_A                           | name | Hospital_A | letters
--days=0                                    | days | 0 | 1 to 3650
--days=soon                                 | --days | soon | integer
--name= --renew                             | renew | name | --name
--clinic={file}                             | clinic | {file} | one after the other
--name= --folder={missing}                  | folder | {missing} | primia-certificate
--name=secret                               | name | secret | use another
--name= --folder={vendor} --clinic={missing} | clinic | {missing} | certificate
--name= --folder={vendor} --clinic={file}   | clinic | {file} | .pem
--name= --folder={vendor} --clinic={expired}/certificate.pem | certificate | only | new one
--helper={file}                             | helper | {file} | one after the other
--name= --folder={vendor} --helper={missing} | helper | {missing} | certificate
--name= --folder={vendor} --helper={vendor}/certificate.pem | helper | vendor | another institution
"""

PUBLISH = """
--folder=                                   | folder | is empty | --folder=
--folder={missing}                          | folder | {missing} | primia-certificate
--folder={folder}                           | folder | {folder} | chmod 700
--folder={bare}                             | folder | {bare} | certificate
--folder={intruded}                         | {intruded} | clinics/evil.pem | remove
--model=                                    | model | '' | letters
--model=A                                   | model | A | letters
--checkpoint=                               | checkpoint | is empty | --checkpoint=
--checkpoint={missing}                      | checkpoint | {missing} | finished training run
--output=logits                             | output | logits | label
--client=hostile                            | client | hostile | checked
--client=checked --ring_bits=64             | client | ring_bits=64 | 32 bits
--client=checked --comparison=fss           | client | fss | comparison=tables
--address=vendor:7443                       | address | vendor:7443 | --client=sharing
--client=sharing --address=vendor:7443      | helper_address | '' | HOST:PORT
--client=sharing --address=v:1 --helper_address=v:1 | helper_address | v:1 | helper's
--margin=0.5                                | margin | 0.5 | at least 1
--batch=0                                   | batch | 0 | positive
--rotate=chest-1                            | rotate | chest-1 | one of them
--rotate=chest-9 --checkpoint=              | rotate | chest-9 | no such
--discard                                   | discard | chest-2 | leave model out
--check_dealer=B_ad                         | check_dealer | B_ad | letters
--check_dealer=hospital-a --check_share=1   | check_share | 1 | less than 1
--check_dealer=hospital-a                   | share | hospital-a | deal more
--score=accuracy                            | score | accuracy | confusion
--score=confusion --opened_to=all           | opened_to | all | both
--score=roc --positive=viral --bins=0       | bins | 0 | 1 to 100
--score=roc                                 | positive | '' | class
--score=confusion --positive=viral          | positive | viral | score=roc
--score=confusion --client=checked          | score | checked | leave client out
--score=confusion --client=sharing          | score | sharing | leave client out
"""

DEAL = """
--folder=                                   | folder | is empty | --folder=
--folder={missing}                          | folder | {missing} | mkdir
--folder={folder}                           | folder | {folder} | chmod 700
--model=                                    | model | '' | letters
--model=chest-9                             | chest-9 | plan | outbox/dealer
--clinic=                                   | clinic | '' | letters
--clinic=../x                               | clinic | ../x | letters
--clinic=secret                             | clinic | secret | use another
--images=0                                  | images | 0 | positive
--images=some                               | --images | some | integer
--disk_gb=-1                                | disk_gb | -1 | gigabytes
--open                                      | open | images | one after the other
--folder={vendor} --clinic=vendor           | clinic | vendor | another institution
"""

SERVE = """
--folder=                                   | folder | is empty | --folder=
--folder={missing}                          | folder | {missing} | primia-certificate
--folder={folder}                           | folder | {folder} | chmod 700
--folder={bare}                             | folder | {bare} | primia-publish
--models=chest-9                            | models | chest-9 | primia-publish
--address=7443                              | address | 7443 | HOST:PORT
--address=:x                                | address | :x | HOST:PORT
--metrics_port=99999                        | metrics_port | 99999 | 65535
--health_port=-2                            | health_port | -2 | -1
--daily_images=0                            | daily_images | 0 | positive
--total_images=-1                           | total_images | -1 | positive
--minute_images=-1                          | minute_images | -1 | positive
--sessions=0                                | sessions | 0 | positive
--clinic_attempts=-1                        | clinic_attempts | -1 | positive
--timeout=nan                               | timeout | nan | positive
--model_owner=7443                          | model_owner | 7443 | HOST:PORT
--model_owner=v:1 --only_checked            | only_checked | model_owner | leave it out
--model_owner=v:1 --folder={bare}           | folder | {bare} | outbox/helper
"""

QUICKSTART = """
--output_dir=                               | output_dir | is empty | --output_dir=
--output_dir={full}                         | output_dir | {full} | new folder
--output_dir={file}                         | output_dir | {file} | folder
--images=0                                  | images | 0 | 1 to 100
--checkpoint={missing}                      | checkpoint | {missing} | finished run
--client=hostile                            | client | hostile | sharing
"""

SCORE = """
--checkpoint=                               | checkpoint | empty | runs/first
--checkpoint={missing}                      | checkpoint | {missing} | training run
--data=                                     | data | '' | folder:PATH
--site_data=folder:a,folder:b               | site_data | folder:a | --data
--data=folder:{missing}                     | data | {missing} | check
--image_size=64                             | image_size | 64 | omit
--opened=logits                             | opened | logits | confusion
--opened_to=dealer                          | opened_to | dealer | hospital
--opened=accuracy                           | threshold | 0 | above 0
--opened=accuracy --threshold=1.5           | threshold | 1.5 | at most 1
--threshold=0.5                             | threshold | 0.5 | --opened=accuracy
--positive=viral                            | positive | viral | --opened=roc
--opened=roc --bins=0                       | bins | 0 | 1 to 100
--small_classes=keep                        | small_classes | keep | merge
--folder={vendor}                           | folder | without connect | --connect
--session_seconds=9                         | session_seconds | without connect | --connect
--connect=127.0.0.1:7443                    | checkpoint | vendor has decided | leave it out
--query_budget=0                            | query_budget | 0 | positive
--vendor_dir=                               | vendor_dir | empty | vendor
--hospital_dir=                             | hospital_dir | empty | hospital
--vendor_dir={file}                         | vendor_dir | {file} | folder
--hospital_dir={new}/v                      | hospital_dir | {new}/v | two folders
--comparison=garbled                        | comparison | garbled | tables
--ring_bits=80                              | ring_bits | 80 | 64
--batch=0                                   | batch | 0 | positive
--calibration=train                         | calibration | train | phantom
--output_dir={file}                         | output_dir | {file} | folder
extra                                       | extra | not a flag | --name=value
"""

PAGE = """
--checkpoint=                               | checkpoint | empty | runs/first
--checkpoint={missing}                      | checkpoint | {missing} | training run
--output=logits                             | output | logits | label
--comparison=garbled                        | comparison | garbled | tables
--ring_bits=80                              | ring_bits | 80 | 64
--calibration=train                         | calibration | train | phantom
--port=99999                                | --port | 99999 | integer
extra                                       | extra | not a flag | --name=value
"""

REMOTE = """
--connect=v:1 --card={card}                 | connect | {card} | use one
--folder={hospital}                         | folder | {hospital} | --connect
--card={card} --model=chest-1               | model | {card} | leave it out
--card={card} --folder={bare}               | folder | {bare} | certificate
--card={selfish} --folder={hospital}        | card | both servers | another institution
--card={card} --checkpoint={run}            | checkpoint | {card} | leave it out
--connect=v --folder={hospital} --model=chest-1 | connect | v | HOST:PORT
--connect=v:1 --folder={hospital} --model=chest-9 | model | chest-9 | chest-1
--connect=v:1 --folder={hospital} --model=chest-1 --ring_bits=32 | ring_bits | v:1 | leave it out
"""

NODE = """
--checkpoint={missing}                      | checkpoint | {missing} | training run
--output=logits                             | output | logits | label
--allowed=                                  | allowed | empty | AE titles
--allowed=PACS,ATITLETHATISTOOLONG          | allowed | ATITLETHATISTOOLONG | 16
--title=                                    | title | '' | 16
--reports_to=                               | reports_to | '' | TITLE@HOST:PORT
--reports_to=PACS                           | reports_to | PACS | TITLE@HOST:PORT
--reports_to=PACS@host:0                    | reports_to | host:0 | TITLE@HOST:PORT
--port=99999                                | port | 99999 | 65535
--max_mb=0                                  | max_mb | 0 | 64
--margin=0                                  | margin | 0 | at least 1
extra                                       | extra | not a flag | --name=value
"""

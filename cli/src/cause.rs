//! Why a life of a node ended, for people.

use lite_llm_core::cluster::supervisor::{Cause, Ending};

/// What became of a node: the rest of a sentence that begins with it.
pub(crate) fn in_words(cause: &Cause) -> String {
    match cause {
        Cause::Ended(Ending::Clean) => "stopped by itself".to_owned(),
        Cause::Ended(Ending::Code(code)) => format!("ended with code {code}"),
        Cause::Ended(Ending::Signal(signal)) => format!("was ended by signal {signal}"),
        Cause::Ended(Ending::Panic { record }) => format!("met a bug at record {record}"),
        Cause::Ended(Ending::Unknown) => "is gone".to_owned(),
        Cause::NeverHeard => "was never heard".to_owned(),
        Cause::Suspected(suspicion) => format!("was suspected and ended ({suspicion:?})"),
        Cause::Diverged => "computed something else than the other ranks, and was ended".to_owned(),
        Cause::Refused(reason) => format!("is refused: {reason}"),
        Cause::Operator => "was ended by the operator".to_owned(),
        Cause::Drained => "was needed no more".to_owned(),
    }
}

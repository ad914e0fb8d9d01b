//! The syntax of GRUB scripts (GNU GRUB manual, "Writing full configuration files directly"):
//! words with quotes and variables, commands, `if`, and blocks in braces.

/// A piece of a word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Text as it is.
    Text(String),
    /// The value of a variable.
    Variable(String),
}

/// A word, and whether any of it was quoted: an unquoted one that comes out empty vanishes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Word {
    /// What it consists of, in order.
    pub parts: Vec<Part>,
    /// Whether quotes were used.
    pub quoted: bool,
}

impl Word {
    /// The word if it is one unquoted text: only such a word can be a keyword.
    fn bare(&self) -> Option<&str> {
        match self.parts.as_slice() {
            [Part::Text(text)] if !self.quoted => Some(text),
            _ => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(Word),
    End,
}

/// A piece of a script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Statement {
    /// A command and its arguments.
    Command(Vec<Word>),
    /// Conditions, each with what follows if it is the first that holds; the last one may be empty.
    If(Vec<(Vec<Word>, Vec<Statement>)>),
    /// A command with a block: `menuentry`, `submenu`, `function`.
    Block(Vec<Word>, Vec<Statement>),
}

/// Deepest nesting that is parsed; bounds the stack that a script can take.
const MAX_DEPTH: usize = 32;

/// Parses a script. What makes no sense is left out: a boot loader goes on as well.
pub(super) fn parse(text: &str) -> Vec<Statement> {
    let tokens = tokenize(text);
    let mut parser = Parser { tokens: &tokens, at: 0 };
    let mut all = Vec::new();
    while parser.at < tokens.len() {
        all.extend(parser.statements(&[], 0));
        // A stray closing keyword.
        parser.at += 1;
    }
    all
}

fn tokenize(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut chars = text.chars().peekable();
    let mut word: Option<Word> = None;
    fn push(word: &mut Option<Word>, c: char) {
        let word = word.get_or_insert_default();
        match word.parts.last_mut() {
            Some(Part::Text(text)) => text.push(c),
            _ => word.parts.push(Part::Text(c.into())),
        }
    }
    let mut double = false;
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('\n') | None => {}
                Some(next) => push(&mut word, next),
            },
            '"' => {
                double = !double;
                word.get_or_insert_default().quoted = true;
            }
            '$' => {
                let mut name = String::new();
                if chars.next_if_eq(&'{').is_some() {
                    name.extend(std::iter::from_fn(|| chars.next_if(|&c| c != '}' && c != '\n')));
                    chars.next_if_eq(&'}');
                } else {
                    let part_of_name = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '_' | '?' | '#' | '@' | '*');
                    name.extend(std::iter::from_fn(|| chars.next_if(part_of_name)));
                }
                if name.is_empty() {
                    push(&mut word, '$');
                } else {
                    word.get_or_insert_default().parts.push(Part::Variable(name));
                }
            }
            _ if double => push(&mut word, c),
            '\'' => {
                word.get_or_insert_default().quoted = true;
                while let Some(c) = chars.next_if(|&c| c != '\'') {
                    push(&mut word, c);
                }
                chars.next();
            }
            '#' if word.is_none() => while chars.next_if(|&c| c != '\n').is_some() {},
            ';' | '\n' => {
                tokens.extend(word.take().map(Token::Word));
                tokens.push(Token::End);
            }
            c if c.is_whitespace() => tokens.extend(word.take().map(Token::Word)),
            c => push(&mut word, c),
        }
    }
    tokens.extend(word.map(Token::Word));
    tokens.push(Token::End);
    tokens
}

struct Parser<'a> {
    tokens: &'a [Token],
    at: usize,
}

impl Parser<'_> {
    fn bare(&self) -> Option<&str> {
        match self.tokens.get(self.at) {
            Some(Token::Word(word)) => word.bare(),
            _ => None,
        }
    }

    /// Statements up to one of the keywords in `until`, which is left to the caller.
    fn statements(&mut self, until: &[&str], depth: usize) -> Vec<Statement> {
        let mut all = Vec::new();
        while self.at < self.tokens.len() {
            match self.bare() {
                Some(word) if until.contains(&word) => break,
                Some("fi" | "else" | "elif" | "then" | "}") if depth == 0 => break,
                Some("if") if depth < MAX_DEPTH => {
                    self.at += 1;
                    all.push(self.conditional(depth + 1));
                }
                _ => {
                    let words = self.words();
                    if self.bare() == Some("{") && depth < MAX_DEPTH {
                        self.at += 1;
                        let body = self.statements(&["}"], depth + 1);
                        self.at += 1;
                        all.push(Statement::Block(words, body));
                    } else if !words.is_empty() {
                        all.push(Statement::Command(words));
                    } else {
                        // An empty line, or a brace that is stray or nested too deep.
                        self.at += 1;
                    }
                }
            }
        }
        all
    }

    /// What follows `if`, including `fi`.
    fn conditional(&mut self, depth: usize) -> Statement {
        let mut branches = Vec::new();
        loop {
            let condition = self.words();
            while self.tokens.get(self.at) == Some(&Token::End) {
                self.at += 1;
            }
            if self.bare() == Some("then") {
                self.at += 1;
            }
            let body = self.statements(&["elif", "else", "fi"], depth);
            branches.push((condition, body));
            let keyword = self.bare().map(str::to_owned);
            self.at += 1;
            match keyword.as_deref() {
                Some("elif") => {}
                Some("else") => {
                    let body = self.statements(&["fi"], depth);
                    self.at += 1;
                    branches.push((Vec::new(), body));
                    return Statement::If(branches);
                }
                _ => return Statement::If(branches),
            }
        }
    }

    /// The words up to the end of the command or to a brace, which is a word of its own everywhere.
    fn words(&mut self) -> Vec<Word> {
        let mut words = Vec::new();
        while let Some(Token::Word(word)) = self.tokens.get(self.at) {
            if matches!(word.bare(), Some("{" | "}")) {
                return words;
            }
            words.push(word.clone());
            self.at += 1;
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nesting_beyond_the_limit_ends() {
        let deep = "if [ a ]; then\n".repeat(10_000) + &"menuentry x {\n".repeat(10_000);
        assert!(!parse(&deep).is_empty());
    }

    #[test]
    fn stray_keywords_do_not_stop_the_parser() {
        let parsed = parse("fi\n}\nset a=b\nthen; c");
        assert_eq!(parsed.len(), 2, "{parsed:?}");
    }
}
